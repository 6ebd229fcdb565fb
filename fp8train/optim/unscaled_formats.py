"""States without scales: FP32, FP64, BF16, and BF16 with the bits that it lacks
(:mod:`fp8train.numerics.remainder`)."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.optimizer_update import BFLOAT16, REMAINDER, WIDE
from fp8train.numerics.remainder import join_remainder, split_remainder
from fp8train.numerics.stochastic import round_mantissa
from fp8train.optim.state_storage import StatePlace, Storage, Stored

_BF16_DROPPED_BITS = 16


class WideStorage(Storage):
    """FP32 or FP64; possibly the memory of the parameter itself."""

    aliases = True

    def __init__(self, place: StatePlace, dtype: torch.dtype, memory: Tensor | None = None) -> None:
        """Zeros, or ``memory`` of the place's shape and this dtype."""
        super().__init__(place)
        self.tensor = place.new(place.shape, dtype) if memory is None else memory
        self._flat = self.tensor.view(-1)

    def load(self, start: int, stop: int) -> Tensor:
        """Return a view of elements ``start .. stop``: writing to it changes the state."""
        return self._flat[start:stop]

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Copy new values in; costs nothing where ``values`` is the view that :meth:`load` returned."""
        del key
        target = self._flat[start:stop]
        if target.data_ptr() != values.data_ptr():
            target.copy_(values)

    def stored(self) -> Stored | None:
        """Return FP32 memory; None in FP64."""
        return Stored(WIDE, self.tensor) if self.tensor.dtype == torch.float32 else None

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: the tensor itself, without a suffix."""
        return {"": self.tensor}


class BFloat16Storage(Storage):
    """BF16, rounded to nearest or, with a key, stochastically."""

    def __init__(self, place: StatePlace) -> None:
        super().__init__(place)
        self.tensor = place.new(place.shape, torch.bfloat16)
        self._flat = self.tensor.view(-1)

    def load(self, start: int, stop: int) -> Tensor:
        """Widen elements ``start .. stop`` to FP32 [stop - start], a new tensor."""
        return self._flat[start:stop].float()

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Round new values to BF16: to nearest, or stochastically with a key."""
        values = values.float()
        if key is not None:
            values = round_mantissa(values, _BF16_DROPPED_BITS, self.place.bits(key, start, stop - start))
        self._flat[start:stop].copy_(values)

    def stored(self) -> Stored:
        """Return the BF16 memory."""
        return Stored(BFLOAT16, self.tensor)

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: the tensor itself, without a suffix."""
        return {"": self.tensor}


class RemainderStorage(Storage):
    """The nearest BF16 number and the 16 bits that it lacks; the BF16 half may be the parameter's memory."""

    def __init__(self, place: StatePlace, memory: Tensor | None = None) -> None:
        """Zeros, or the value of the BF16 parameter ``memory`` of the place's shape."""
        super().__init__(place)
        self.high = place.new(place.shape, torch.bfloat16) if memory is None else memory
        self.low = place.new(place.shape, torch.int16)
        self._flat_high, self._flat_low = self.high.view(-1).view(torch.int16), self.low.view(-1)

    def load(self, start: int, stop: int) -> Tensor:
        """Put the two halves of elements ``start .. stop`` together: FP32 [stop - start], bit for bit what
        was stored."""
        return join_remainder(self._flat_high[start:stop], self._flat_low[start:stop])

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Cut new FP32 values into the nearest BF16 number and the bits that it lacks; nothing is rounded."""
        del key
        high, low = split_remainder(values.float())
        self._flat_high[start:stop].copy_(high)
        self._flat_low[start:stop].copy_(low)

    def stored(self) -> Stored:
        """Return both halves."""
        return Stored(REMAINDER, self.high, self.low)

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: ``.weight``, the BF16 half, and ``.remainder``, its int16 complement."""
        return {".weight": self.high, ".remainder": self.low}
