"""One optimizer step, and what a checkpoint must hold to repeat it.

A step, for this rank's micro-batches: forward gives the summed loss, divided by the *global* number of target
tokens; backward fills the gradient store, which reduces while backward goes on; the norm of all gradients
gives one clip factor; the optimizer reads gradient and state and writes new weights. A step whose gradient is
not finite changes nothing, on all ranks together (the norm is of the reduced gradients, so all ranks see the
same one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.layers.loss import IGNORE
from fp8train.models.build import COMPUTE_DTYPES, BuiltModel, build_model, initialise
from fp8train.numerics.statistics import CastRecorder
from fp8train.optim.adamw import AdamW, AdamWSettings
from fp8train.optim.clipping import clip_multiplier
from fp8train.optim.schedule import lr_factor
from fp8train.parallel.gradient_store import GradientStore

_GRADIENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: global mean loss in nats per token, device scalar.
        grad_norm: norm before clipping, host number.
        lr: learning rate used.
        applied: False if the gradient was not finite and the step was skipped.
    """

    loss: Tensor
    grad_norm: float
    lr: float
    applied: bool


def inputs_and_targets(tokens: Tensor, ignore_after: int | None) -> tuple[Tensor, Tensor]:
    """Cut samples into model inputs and next-token targets.

    Args:
        tokens: int64 [.., S+1].
        ignore_after: an end-of-document id whose following prediction is left out of the loss; None keeps
            all.

    Returns:
        (inputs, targets), each [.., S]; left-out targets are -100.
    """
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    if ignore_after is not None:
        targets = torch.where(inputs == ignore_after, IGNORE, targets)
    return inputs.contiguous(), targets.contiguous()


class Trainer:
    """Model, gradient store and optimizer of one process.

    Attributes:
        built: the model and its FP8 plan.
        store: gradients.
        optimizer: master weights and moments.
        updates: optimizer steps applied (skipped ones do not count).
        recorder: FP8 cast statistics; None without FP8 or with statistics off.
    """

    def __init__(
        self, config: Config, processes: Processes, *, vocab_size: int, ignore_after: int | None = None
    ) -> None:
        """Build everything and fill in the values of step 0."""
        self.config, self.processes, self.ignore_after = config, processes, ignore_after
        self.built: BuiltModel = build_model(config, vocab_size=vocab_size, device=processes.device)
        self.model = self.built.model
        self.updates = 0
        gradient = config.precision.gradient
        fp64 = COMPUTE_DTYPES[config.precision.compute] == torch.float64
        self.store = GradientStore(
            self.model,
            accumulate=torch.float64 if fp64 else _GRADIENT_DTYPES[gradient.accumulate],
            reduce=torch.float64 if fp64 else _GRADIENT_DTYPES[gradient.reduce],
            bucket_bytes=gradient.bucket_mib * 2**20,
            group=processes.dp,
        )
        o = config.optimizer
        self.optimizer = AdamW(
            dict(self.model.named_parameters()),
            self.model.specs,
            AdamWSettings(lr=o.lr, beta1=o.beta1, beta2=o.beta2, eps=o.eps, weight_decay=o.weight_decay),
        )
        initialise(self.model, config.run.seed, self.optimizer.seed_master)
        self.recorder = self._attach_recorder()

    def _attach_recorder(self) -> CastRecorder | None:
        if self.built.fp8 is None or self.config.logging.cast_statistics_interval == 0:
            return None
        paths = self.built.fp8.converted
        sites = [f"{path}/{operand}" for path in paths for operand in ("x", "w", "grad_output")]
        recorder = CastRecorder(sites, self.processes.device)
        for path, linear in self.model.linears().items():
            if path in paths:
                linear.recorder = recorder
        return recorder

    def step(self, step: int, micro_batches: Tensor) -> StepResult:
        """Run optimizer step ``step`` (0-based).

        Args:
            step: position in the schedule.
            micro_batches: this rank's int64 [A, B, S+1], on the CPU.
        """
        inputs, targets = inputs_and_targets(micro_batches, self.ignore_after)
        inputs, targets = (t.to(self.processes.device, non_blocking=True) for t in (inputs, targets))
        num_tokens = self._global_token_count(targets)
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        self.store.begin_step(len(inputs))
        for x, y in zip(inputs, targets, strict=True):
            loss_sum = self.model(x, y)
            (loss_sum / num_tokens).backward()
            total += loss_sum.detach()
        self.processes.dp.all_reduce(total, purpose="loss")()
        self.store.finish()
        norm = self.store.global_norm()
        factor = lr_factor(self.config.schedule, step, self.config.total_steps)
        applied = bool(torch.isfinite(norm))  # the one host sync of a step
        if applied:
            self.updates += 1
            self.optimizer.step(
                self.store.grad,
                step=self.updates,
                lr_factor=factor,
                grad_multiplier=clip_multiplier(norm, self.config.optimizer.clip_grad_norm),
            )
        return StepResult(total / num_tokens, float(norm), self.config.optimizer.lr * factor, applied)

    def _global_token_count(self, targets: Tensor) -> Tensor | int:
        """Target tokens of the whole global batch; known without communication unless some are left out."""
        if self.ignore_after is None:
            return targets.numel() * self.processes.dp.size
        count = (targets != IGNORE).sum().double()
        self.processes.dp.all_reduce(count, purpose="loss")()
        return count.clamp(min=1)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint: master weights and moments. The model's own weights are their
        rounding."""
        return self.optimizer.state_tensors()

    def state_meta(self) -> dict[str, int]:
        """Host state of a checkpoint."""
        return {"updates": self.updates}

    def restored(self, meta: dict[str, int]) -> None:
        """Finish loading after :meth:`state_tensors` were filled in place."""
        self.updates = meta["updates"]
        self.optimizer.publish()
