"""One optimizer step, and what a checkpoint must hold to repeat it.

A step, for this rank's micro-batches: forward gives the summed loss, divided by the *global* number of target
tokens; backward fills the gradient store, which reduces while backward goes on; the norm of all gradients
gives one clip factor; the optimizer reads gradient and state and writes new weights. A step whose gradient is
not finite changes nothing, on all ranks together (the norm is of the reduced gradients, so all ranks see the
same one).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.config.world import accumulation_steps
from fp8train.layers.loss import IGNORE
from fp8train.models.build import BuiltModel, build_model, initialise, make_scale_state
from fp8train.numerics.statistics import CastRecorder
from fp8train.optim.clipping import clip_multiplier
from fp8train.optim.schedule import lr_factor
from fp8train.parallel.gradient_store import GradientStore
from fp8train.training.precision import all_reduce_max, make_gradient_plan, make_run_optimizer


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
        gradients: how gradients are stored and reduced, and the scale state of that.
        store: gradients.
        optimizer: master weights and moments.
        scales: state of delayed scales; None if there are none.
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
        contributions = accumulation_steps(config, processes.dp.size)
        self.recorder = self._attach_recorder()
        self.gradients = make_gradient_plan(
            config, processes, self.built, contributions=contributions, recorder=self.recorder
        )
        self.store = GradientStore(self.model, self.gradients)
        self.optimizer = make_run_optimizer(config, self.built)
        self.scales = make_scale_state(self.model, processes.device)
        initialise(self.model, config.run.seed, self.optimizer.seed_master)
        self.optimizer.publish()

    def _attach_recorder(self) -> CastRecorder | None:
        if self.built.fp8 is None or self.config.logging.cast_statistics_interval == 0:
            return None
        paths = self.built.fp8.converted
        operands = ["x", "w", "grad_output"]
        gradient = self.config.precision.gradient
        if gradient.format != "high_precision" and gradient.fp8.reduce not in ("shared_scale", "exact"):
            operands.append("grad_weight")
        sites = [f"{path}/{operand}" for path in paths for operand in operands]
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
        if self.gradients.needs_calibration:
            with self.gradients.calibration():
                self._accumulate(inputs, targets, num_tokens)
        with nullcontext() if self.scales is None else self.scales.recording():
            total = self._accumulate(inputs, targets, num_tokens)
        self.processes.dp.all_reduce(total, purpose="loss")()
        norm = self.store.global_norm()
        factor = lr_factor(self.config.schedule, step, self.config.total_steps)
        applied = bool(torch.isfinite(norm))  # the one host sync of a step
        self._move_scales(applied)  # first: new weights are cast with the next step's scales
        if applied:
            self.updates += 1
            self.optimizer.step(
                self.store.reader,
                step=self.updates,
                lr_factor=factor,
                grad_multiplier=clip_multiplier(norm, self.config.optimizer.clip_grad_norm),
            )
        return StepResult(total / num_tokens, float(norm), self.config.optimizer.lr * factor, applied)

    def _accumulate(self, inputs: Tensor, targets: Tensor, num_tokens: Tensor | int) -> Tensor:
        """Forward and backward of all micro-batches into the store, reduced. Returns this rank's summed loss,
        an FP64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        self.store.begin_step(len(inputs))
        self.gradients.begin_step()
        for x, y in zip(inputs, targets, strict=True):
            loss_sum = self.model(x, y)
            (loss_sum / num_tokens).backward()
            total += loss_sum.detach()
        self.store.finish()
        self.gradients.end_step()
        return total

    def _move_scales(self, applied: bool) -> None:
        """The only moment at which scale state changes, and only if the optimizer step is applied."""
        if applied:
            self.gradients.commit()
        if self.scales is not None:
            self.scales.advance(lambda tensor: all_reduce_max(self.processes, tensor), applied=applied)

    def _global_token_count(self, targets: Tensor) -> Tensor | int:
        """Target tokens of the whole global batch; known without communication unless some are left out."""
        if self.ignore_after is None:
            return targets.numel() * self.processes.dp.size
        count = (targets != IGNORE).sum().double()
        self.processes.dp.all_reduce(count, purpose="loss")()
        return count.clamp(min=1)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint: master weights, moments and scale state. The model's own weights are
        the masters' rounding."""
        scales = {} if self.scales is None else self.scales.state_tensors()
        return self.optimizer.state_tensors() | self.gradients.state_tensors() | scales

    def rank_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint that belong to this rank alone; usually none."""
        return self.gradients.rank_tensors()

    def state_meta(self) -> dict[str, Any]:
        """Host state of a checkpoint."""
        return {"updates": self.updates, **self.optimizer.state_meta(), **self.gradients.state_meta()}

    def check_meta(self, meta: dict[str, Any]) -> None:
        """Whether a checkpoint with this host state fits.

        Raises:
            ValueError: other state formats, or another reduction with a state of its own.
        """
        self.optimizer.load_state_meta(meta)
        self.gradients.check_meta(meta)

    def restored(self, meta: dict[str, Any]) -> None:
        """Finish loading after :meth:`state_tensors` were filled in place."""
        self.updates = meta["updates"]
        self.gradients.restored()
        self.optimizer.publish()

    def precision_metrics(self) -> dict[str, float]:
        """State of the reduction for the log; waits for the device."""
        return self.gradients.metrics()

    def sent_bytes(self) -> dict[str, int]:
        """Bytes this rank has sent since the start, by collective and purpose."""
        return dict(self.gradients.sent_bytes())
