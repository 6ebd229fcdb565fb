"""The interface by which the optimizer hands new weights to a model that keeps no high-precision copy of
them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fp8train.kernels.stored_weight import StoredWeight


class WeightTarget(Protocol):
    """The FP8 operands of one linear, cast from the master weight after each step.

    The optimizer calls ``begin``, then ``write`` for pieces that cover the local tensor in order, then
    ``end``; or, on a GPU, ``take`` alone. What it hands over are the values *as stored*, so that the operands
    after a step equal those made again from a checkpoint.
    """

    def begin(self, amax: Tensor) -> None:
        """Start a new weight. ``amax``: FP32 scalar on the device, largest magnitude of all values."""
        ...

    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Take elements ``start .. stop`` in row-major order: FP32 [stop - start], not to be kept."""
        ...

    def end(self) -> None:
        """Take note that all elements were written: the new weight is complete."""
        ...

    def take(self, start: int, weight: StoredWeight) -> bool:
        """Make the new weight of a stored master, which begins at row-major element ``start`` and changes no
        more until the next forward; False if it must come in pieces."""
        ...
