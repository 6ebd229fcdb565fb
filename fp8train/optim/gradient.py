"""The interface by which an optimizer reads a gradient: in pieces, so that FP8 gradients are never widened as
a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.parallel.gradients.held import GradientReader, StoredGradient

__all__ = ["GradientReader", "PartOfGradient", "TensorGradient"]


class TensorGradient:
    """A gradient that is held as an ordinary tensor."""

    def __init__(self, tensor: Tensor) -> None:
        """Read ``tensor``: contiguous, any float dtype but FP8."""
        self._flat = tensor.detach().view(-1)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return elements ``start .. stop`` in row-major order, FP32 or FP64 [stop - start]; FP32 and FP64
        gradients as views."""
        values = self._flat[start:stop]
        return values if values.dtype == torch.float64 else values.float()

    def stored(self, count: int) -> StoredGradient | None:
        """The first ``count`` elements of FP32 and BF16 gradients."""
        return StoredGradient.of_values(self._flat[:count])


class PartOfGradient:
    """Whole rows of a gradient, seen from the first of them on."""

    def __init__(self, reader: GradientReader, start: int) -> None:
        """Args: ``reader``: of the gradient; ``start``: the first element of the rows."""
        self._reader, self._start = reader, start

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return elements ``start .. stop`` of the rows."""
        return self._reader.chunk(self._start + start, self._start + stop)

    def stored(self, count: int) -> StoredGradient | None:
        """The first ``count`` elements: what lies behind the rows before, which have as many blocks each."""
        if not count or (stored := self._reader.stored(self._start + count)) is None:
            return None
        before = len(stored.values) * self._start // (self._start + count)
        scales = None if stored.scales is None else stored.scales[before:]
        return StoredGradient(stored.values[before:], scales)
