"""Storage of one optimizer state of one parameter, read and written in chunks.

An update rule sees FP32 values only (FP64 in FP64 runs): ``load`` decodes a piece, ``store`` encodes it.
Here are the interface and the formats without scales; :mod:`fp8train.optim.scaled_storage` has those with.

**BF16 + remainder.** An FP32 number, read as an integer ``u``, is cut into ``high = (u + 2^15) >> 16`` and
``low = u - (high << 16)``, which lies in [-2^15, 2^15): ``high`` are the bits of the nearest BF16 number and
``high · 2^16 + low`` is ``u`` again. So master and BF16 weight together take the 4 bytes of FP32. Exact ties
go away from zero: with ties to even, the two numbers half-way below and above an even ``high`` would have the
same (high, low). One FP32 number in 131072 is a tie.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.numerics.stochastic import random_bits, random_bits_at, round_mantissa

ALIGNMENT = 64
_BF16_DROPPED_BITS = 16


@dataclass(frozen=True)
class Layout:
    """A local tensor and its place in the logical one.

    Attributes:
        shape: local shape; rows lie along the last dimension.
        block: elements that share a scale, along rows.
        offset: logical row-major index of the first local element; random bits are drawn by logical index.
        logical_row: elements of a logical row; default: as local ones.
        device: where it lives.
    """

    shape: tuple[int, ...]
    block: int
    offset: int
    device: torch.device
    logical_row: int | None = None

    @property
    def numel(self) -> int:
        """Number of local elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Number of elements in a local row."""
        return self.shape[-1] if self.shape else 1

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of a tensor with one entry per block."""
        return (*self.shape[:-1], -(-self.row // self.block))

    @property
    def unit(self) -> int:
        """Chunks must be a multiple of this: of whole blocks, or of whole rows where a row ends in a short
        block; and of 64 elements, so that the vector tails of kernels fall where they fall in one piece."""
        return math.lcm(self.block if self.row % self.block == 0 else self.row, ALIGNMENT)

    def bits(self, key: int, start: int, count: int) -> Tensor:
        """Random bits of local elements ``start .. start + count``: int32 [count]."""
        if self.logical_row in (None, self.row):
            return random_bits(key, self.offset + start, count, self.device)
        index = torch.arange(start, start + count, dtype=torch.int64, device=self.device)
        row, column = index // self.row, index % self.row
        return random_bits_at(key, row * self.logical_row + column + self.offset)


class Storage(ABC):
    """One state of one parameter, in one format. Subclasses are the formats.

    Attributes:
        layout: the tensor.
        two_pass: the scale covers more than a chunk: :meth:`begin` must be told the amax of all values before
            the first :meth:`store`, and :meth:`end` follows the last. Until then :meth:`load` reads the old
            values, also of chunks that were stored.
        aliases: :meth:`load` returns the storage's own memory, and writing to it is storing.
    """

    two_pass = False
    aliases = False

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def load(self, start: int, stop: int) -> Tensor:
        """Values of flat elements ``start .. stop``, FP32 or FP64; the caller may overwrite them."""

    @abstractmethod
    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Encode new values; those of one call must be finite and cover whole blocks.

        Args:
            start: first flat element; a multiple of the layout's unit.
            stop: end; a multiple of the unit or of the tensor.
            values: FP32 or FP64 [stop - start].
            key: of the random bits (:func:`~fp8train.numerics.stochastic.stream_key`); None rounds to
                nearest.
        """

    def begin(self, amax: Tensor) -> None:
        """Announce new values of this largest magnitude (FP32 scalar); ``two_pass`` only."""
        raise AssertionError(f"{type(self).__name__} stores in one pass")

    def end(self) -> None:
        """Take note that all new values are stored; ``two_pass`` only."""
        raise AssertionError(f"{type(self).__name__} stores in one pass")

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by suffix: ``""`` for formats of one tensor. Filled in place on load."""

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes, scales included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class WideStorage(Storage):
    """FP32 or FP64; possibly the memory of the parameter itself."""

    aliases = True

    def __init__(self, layout: Layout, dtype: torch.dtype, memory: Tensor | None = None) -> None:
        """Zeros, or ``memory`` of the layout's shape and this dtype."""
        super().__init__(layout)
        self.tensor = (
            torch.zeros(layout.shape, dtype=dtype, device=layout.device) if memory is None else memory
        )
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

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.tensor = torch.zeros(layout.shape, dtype=torch.bfloat16, device=layout.device)
        self._flat = self.tensor.view(-1)

    def load(self, start: int, stop: int) -> Tensor:
        """Widen elements ``start .. stop`` to FP32 [stop - start], a new tensor."""
        return self._flat[start:stop].float()

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Round new values to BF16: to nearest, or stochastically with a key."""
        values = values.float()
        if key is not None:
            values = round_mantissa(values, _BF16_DROPPED_BITS, self.layout.bits(key, start, stop - start))
        self._flat[start:stop].copy_(values)

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: the tensor itself, without a suffix."""
        return {"": self.tensor}


class RemainderStorage(Storage):
    """The nearest BF16 number and the 16 bits that it lacks; the BF16 half may be the parameter's memory."""

    def __init__(self, layout: Layout, memory: Tensor | None = None) -> None:
        """Zeros, or the value of the BF16 parameter ``memory`` of the layout's shape."""
        super().__init__(layout)
        if memory is None:
            memory = torch.zeros(layout.shape, dtype=torch.bfloat16, device=layout.device)
        self.high = memory
        self.low = torch.zeros(layout.shape, dtype=torch.int16, device=layout.device)
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
