"""How gradient storages and reductions report what their casts to FP8 did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp8train.numerics.statistics import CastRecorder


@dataclass(frozen=True)
class GradientRecorder:
    """Takes statistics of gradient casts, whose site is named after the linear as those of operands are."""

    recorder: CastRecorder

    @property
    def active(self) -> bool:
        """Whether this step is sampled; casts of other steps are not reported."""
        return self.recorder.active

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """Take one cast: source and payload of one shape, ``scale_inv`` broadcastable to it."""
        self.recorder.record(f"{fqn.removesuffix('.weight')}/grad_weight", source, payload, scale_inv)
