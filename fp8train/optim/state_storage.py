"""Storage of one optimizer state of one parameter, read and written in chunks.

An update rule sees FP32 values only (FP64 in FP64 runs): ``load`` decodes a piece, ``store`` encodes it.
Here is the interface; the formats are in :mod:`fp8train.optim.unscaled_formats` and
:mod:`fp8train.optim.scaled_formats`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fp8train.numerics.stochastic import random_bits_in_rows
from fp8train.update_rules.rule import ALIGNMENT

SCALE_SUFFIXES = (".scale", ".scale_inv", ".amax", ".power")
"""Of what a checkpoint holds of a state, those that describe scales of blocks or tensors."""


Take = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Gives memory for a tensor of a shape and dtype; its content is undefined."""


@dataclass(frozen=True)
class StatePlace:
    """The shape of a local state and its place in the logical one, in blocks.

    Attributes:
        shape: local shape; rows lie along the last dimension.
        block: elements that share a scale, along rows.
        offset: logical row-major index of the first local element; random bits are drawn by logical index.
        logical_row: elements of a logical row; default: as local ones.
        device: where it lives.
        take: gives the memory, on ``device``; None allocates it.
    """

    shape: tuple[int, ...]
    block: int
    offset: int
    device: torch.device
    logical_row: int | None = None
    take: Take | None = None

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, value: float = 0) -> Tensor:
        """Memory of the state, filled with ``value``."""
        if self.take is None:
            memory = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            memory = self.take(shape, dtype)
        return memory.fill_(value)

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
        whole = self.row if self.logical_row is None else self.logical_row
        return random_bits_in_rows(
            key, start, count, row=self.row, logical_row=whole, offset=self.offset, device=self.device
        )


class Stored(NamedTuple):
    """A state as it lies in memory, for a kernel that decodes and encodes it itself.

    Attributes:
        mantissa: bits of its format, as :mod:`fp8train.kernels.optimizer_update` tells formats.
        payload: codes or values, contiguous, of the state's shape.
        scale: E8M0 bytes of its blocks, or lower halves; None where the format has neither.
        root: whether the square root of the state is what is stored.
    """

    mantissa: int
    payload: Tensor
    scale: Tensor | None = None
    root: bool = False


class Storage(ABC):
    """One state of one parameter, in one format. Subclasses are the formats.

    Attributes:
        place: shape and place of the state.
        two_pass: the scale covers more than a chunk: :meth:`begin` must be told the amax of all values before
            the first :meth:`store`, and :meth:`end` follows the last. Until then :meth:`load` reads the old
            values, also of chunks that were stored.
        aliases: :meth:`load` returns the storage's own memory, and writing to it is storing.
    """

    two_pass = False
    aliases = False

    def __init__(self, place: StatePlace) -> None:
        self.place = place

    @abstractmethod
    def load(self, start: int, stop: int) -> Tensor:
        """Values of flat elements ``start .. stop``, FP32 or FP64; the caller may overwrite them."""

    @abstractmethod
    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Encode new values; those of one call must be finite and cover whole blocks.

        Args:
            start: first flat element; a multiple of the place's unit.
            stop: end; a multiple of the unit or of the tensor.
            values: FP32 or FP64 [stop - start].
            key: of the random bits (:func:`~fp8train.numerics.stochastic.stream_key`); None rounds to
                nearest.
        """

    def restore(self, start: int, stop: int, values: Tensor) -> None:
        """:meth:`store` decoded values of a checkpoint, to nearest. Values that :meth:`load` gave of these
        very blocks are found again to the bit: a power-of-two scale that moves loses nothing.
        """
        self.store(start, stop, values, None)

    def begin(self, amax: Tensor) -> None:
        """Announce new values of this largest magnitude (FP32 scalar); ``two_pass`` only."""
        raise AssertionError(f"{type(self).__name__} stores in one pass")

    def end(self) -> None:
        """Take note that all new values are stored; ``two_pass`` only."""
        raise AssertionError(f"{type(self).__name__} stores in one pass")

    def stored(self) -> Stored | None:
        """The memory itself; None for a format that only this class decodes and encodes."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by suffix: ``""`` for formats of one tensor. Filled in place on load."""

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes, scales included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def scale_bytes(self) -> int:
        """What of :attr:`nbytes` is scales."""
        return sum(tensor.nbytes for suffix, tensor in self.tensors().items() if suffix in SCALE_SUFFIXES)
