"""What takes statistics of gradient casts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GradientRecorder(Protocol):
    """See :class:`fp8train.numerics.statistics.CastRecorder`."""

    @property
    def active(self) -> bool:
        """Whether this step is sampled."""
        ...

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """Take one cast: source and payload of one shape, ``scale_inv`` broadcastable to it."""
        ...
