"""States without scales: FP32, FP64, BF16, and BF16 with the bits that it lacks.

**BF16 + remainder.** An FP32 number, read as an integer ``u``, is cut into ``high = (u + 2^15) >> 16`` and
``low = u - (high << 16)``, which lies in [-2^15, 2^15): ``high`` are the bits of the nearest BF16 number and
``high · 2^16 + low`` is ``u`` again. So master and BF16 weight together take the 4 bytes of FP32. Exact ties
go away from zero: with ties to even, the two numbers half-way below and above an even ``high`` would have the
same (high, low). One FP32 number in 131072 is a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.numerics.stochastic import round_mantissa
from fp8train.optim.state_storage import StatePlace, Storage

_BF16_DROPPED_BITS = 16


class WideStorage(Storage):
    """FP32 or FP64; possibly the memory of the parameter itself."""

    aliases = True

    def __init__(self, place: StatePlace, dtype: torch.dtype, memory: Tensor | None = None) -> None:
        """Zeros, or ``memory`` of the place's shape and this dtype."""
        super().__init__(place)
        self.tensor = torch.zeros(place.shape, dtype=dtype, device=place.device) if memory is None else memory
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

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: the tensor itself, without a suffix."""
        return {"": self.tensor}


class BFloat16Storage(Storage):
    """BF16, rounded to nearest or, with a key, stochastically."""

    def __init__(self, place: StatePlace) -> None:
        super().__init__(place)
        self.tensor = torch.zeros(place.shape, dtype=torch.bfloat16, device=place.device)
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

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: the tensor itself, without a suffix."""
        return {"": self.tensor}


class RemainderStorage(Storage):
    """The nearest BF16 number and the 16 bits that it lacks; the BF16 half may be the parameter's memory."""

    def __init__(self, place: StatePlace, memory: Tensor | None = None) -> None:
        """Zeros, or the value of the BF16 parameter ``memory`` of the place's shape."""
        super().__init__(place)
        if memory is None:
            memory = torch.zeros(place.shape, dtype=torch.bfloat16, device=place.device)
        self.high = memory
        self.low = torch.zeros(place.shape, dtype=torch.int16, device=place.device)
        self._flat_high, self._flat_low = self.high.view(-1).view(torch.int16), self.low.view(-1)

    def load(self, start: int, stop: int) -> Tensor:
        """Put the two halves of elements ``start .. stop`` together: FP32 [stop - start], bit for bit what
        was stored."""
        bits = self._flat_high[start:stop].to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(self._flat_low[start:stop]).view(torch.float32)

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Cut new FP32 values into the nearest BF16 number and the bits that it lacks; nothing is rounded."""
        del key
        bits = values.float().view(torch.int32)
        high = (bits + (1 << 15)).bitwise_right_shift_(16)
        self._flat_high[start:stop].copy_(high)
        self._flat_low[start:stop].copy_(bits - high.bitwise_left_shift_(16))

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: ``.weight``, the BF16 half, and ``.remainder``, its int16 complement."""
        return {".weight": self.high, ".remainder": self.low}
