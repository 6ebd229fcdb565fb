"""The protocol by which gradient storages and reductions report what their casts to FP8 did."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GradientRecorder(Protocol):
    """Takes statistics of gradient casts, as :class:`fp8train.numerics.statistics.CastRecorder` takes those
    of other casts."""

    @property
    def active(self) -> bool:
        """Whether this step is sampled; casts of other steps are not reported."""
        ...

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """Take one cast: source and payload of one shape, ``scale_inv`` broadcastable to it."""
        ...
