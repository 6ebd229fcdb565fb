"""What a trainer is to the loop, to checkpoints and to the log, whoever keeps gradients and optimizer states.

The engines: :class:`fp8train.step.trainer.Trainer`, this package's own, and
:class:`fp8train.deepspeed_engine.trainer.DeepSpeedTrainer`. Both hold a model with its FP8 parts and what is
watched of it, count the target tokens of a step, and show checkpoints the same logical tensors, so that a run
can go on with the other engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fp8train.checkpoint.logical import LogicalTensor
from fp8train.comm.processes import Processes
from fp8train.comm.progress import Progress
from fp8train.config.schema import Config
from fp8train.layers.loss import IGNORE
from fp8train.models.build import BuiltModel
from fp8train.models.connect import Fp8Parts
from fp8train.models.decoder import Decoder
from fp8train.numerics.scale_state import ScaleState
from fp8train.optim.optimizer import Optimizer
from fp8train.step.monitors import Monitors
from fp8train.step.result import StepResult
from fp8train.step.scale_events import ScaleEvents


class BaseTrainer(ABC):
    """Model and optimizer of one process, behind any engine.

    Attributes:
        built: the model, or what this rank's pipeline stages hold of it, and its FP8 plan.
        outline: the whole model, without storage where this rank holds a part.
        parts: recorder, scale state and FP8 weights of the linears.
        scales: state of delayed scales; None if there are none.
        optimizer: master weights and moments, as checkpoints see them.
        updates: optimizer steps applied (skipped ones do not count).
        monitors: what is watched, and the guard.
        progress: told where this rank is; the run's, once there is one.
    """

    parts: Fp8Parts
    scales: ScaleState | None
    optimizer: Optimizer
    _scale_events: ScaleEvents | None

    def __init__(
        self,
        config: Config,
        processes: Processes,
        built: BuiltModel,
        whole: Decoder,
        *,
        ignore_after: int | None,
    ) -> None:
        """``whole``: the :attr:`outline`; ``ignore_after``: token after which targets are left out."""
        self.config, self.processes, self.ignore_after = config, processes, ignore_after
        self.built, self.model, self.outline = built, built.model, whole
        rule = self.model.parametrization
        self._unscale = 1 / rule.gradient_scale if rule.true_gradients else 1.0
        weights = [rule.norm_weight(spec) for spec in whole.specs.values()]
        self._norm_weights: Tensor | None = None  # all 1: nothing to multiply
        if any(weight != 1.0 for weight in weights):
            self._norm_weights = torch.tensor(weights, dtype=torch.float64, device=processes.device)
        self.updates = 0
        self.progress = Progress()
        self.monitors = Monitors(config, processes, built)

    @abstractmethod
    def step(self, step: int, micro_batches: Tensor) -> StepResult:
        """Run optimizer step ``step`` (0-based): forward, backward, reduction, clipping, update, new weights.

        Args:
            step: position in the schedule.
            micro_batches: this rank's int64 [A, B, S+1], on the CPU.
        """

    @abstractmethod
    def restored(self, meta: Mapping[str, Any]) -> None:
        """Finish loading after :meth:`state_tensors` were filled in place. ``meta``: with ``updates``, which
        the moments have seen."""

    @abstractmethod
    def sent_bytes(self) -> dict[str, int]:
        """Bytes this rank has sent since the start, by collective and purpose, over all axes."""

    def replicated_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """The parameters that all data-parallel ranks hold alike, by name."""
        return self.model.named_parameters()

    @property
    def keeps_residuals(self) -> bool:
        """Whether gradients leave residuals of error feedback, which belong to a rank."""
        return False

    @torch.no_grad()
    def summed_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward only, with the training numerics: int64 [A, B, S] each, on the device. Returns nats as an
        FP64 scalar; zero on ranks without the last pipeline stage."""
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for x, y in zip(inputs, targets, strict=True):
            total += self.model(x, y)
        return total

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint: master weights, moments and scale state. The model's own weights are
        the masters' rounding."""
        return self.optimizer.states.tensors() | self.scale_tensors()

    def scale_tensors(self) -> dict[str, Tensor]:
        """The scale state among :meth:`state_tensors`: that of gradients and that of delayed scales."""
        return {} if self.scales is None else self.scales.state_tensors()

    def checkpoint_tensors(self) -> dict[str, Tensor | LogicalTensor]:
        """:meth:`state_tensors`, with the place of those that are parts of a logical tensor."""
        parts = {
            name: LogicalTensor(tensor, shape, offset)
            for name, (tensor, shape, offset) in self.optimizer.states.logical_tensors().items()
            if tuple(tensor.shape) != shape
        }
        return {**self.state_tensors(), **parts}

    def rank_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint that belong to this rank alone; usually none."""
        return {}

    def state_meta(self) -> dict[str, Any]:
        """Host state for a checkpoint, as JSON values."""
        return {"updates": self.updates, **self.monitors.state(), **self.optimizer.state_meta()}

    def check_meta(self, meta: dict[str, Any], accepted: Callable[[str], bool] = lambda key: False) -> None:
        """Check that training can go on from a checkpoint with this host state.

        Args:
            meta: the checkpoint's :meth:`state_meta`.
            accepted: settings that the user changes knowingly.

        Raises:
            ValueError: another update rule, or other settings that ``exact`` depends on.
        """
        del accepted
        self.check_rule(meta)

    def check_rule(self, meta: Mapping[str, Any]) -> None:
        """Check that a checkpoint's optimizer states are of this run's update rule.

        Raises:
            ValueError: another update rule.
        """
        try:
            self.optimizer.check_state_meta(meta)
        except ValueError as error:
            raise ValueError(f"optimizer.name: {error}") from None

    def precision_metrics(self) -> dict[str, float]:
        """State of the reduction and of the guard for the log; waits for the device. Collective over the
        pipeline's ranks."""
        return self.monitors.guard_metrics()

    def new_scale_events(self) -> dict[str, dict[str, int]] | None:
        """Amaxes since the last call that gave no delayed scale, by slot; None without delayed scales. Not of
        linears that are out of FP8, which have none. Waits for the device; collective over the pipeline's
        ranks."""
        if self._scale_events is None:
            return None
        out = () if self.monitors.guard is None else self.monitors.guard.locked
        found = self._scale_events.take()
        return {slot: counts for slot, counts in found.items() if slot.rpartition("/")[0] not in out}

    def _watch_scales(self) -> ScaleEvents | None:
        fp8, quant = self.built.fp8, self.config.precision.gemm.value()
        if fp8 is None or quant is None:
            return None
        delayed = [use for use, spec in quant.casts().items() if spec.scale_source == "delayed"]
        slots = [f"{path}/{use}" for path in fp8.converted for use in delayed]
        if not slots:
            return None
        return ScaleEvents(slots, self.scales, self.processes.pp, self.processes.device)

    def _forget_casts(self) -> None:
        for linear in self.model.linears().values():
            linear.forget_casts()
        if self.model.fp8_head is not None:
            self.model.fp8_head.forget()

    def _part(self, tokens: Tensor) -> Tensor:
        """This rank's tokens of each sequence, on its device."""
        context = self.model.context
        return (tokens if context is None else context.part(tokens)).to(
            self.processes.device, non_blocking=True
        )

    def _global_token_count(self, targets: Tensor) -> Tensor | int:
        """Target tokens of the whole global batch; known without communication unless some are left out, and
        then an FP64 scalar, perhaps zero."""
        if self.ignore_after is None and self.config.data.kind == "pretrain":
            return targets.numel() * self.processes.replicas.size
        count = (targets != IGNORE).sum().double()
        self.processes.replicas.all_reduce(count, purpose="loss")()
        return count
