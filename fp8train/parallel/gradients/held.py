"""Reduced gradients as the optimizer reads them.

A *held* object is what a reduction leaves on this rank: codes together with everything they were made with.
It looks nothing up later, so scale state may move before, while or after it is read. One class per form:
values, FP8 blocks, FP8 tensors; sums on a grid are in :mod:`fp8train.parallel.gradients.grids`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fp8train.kernels.block_cast import squares_of_blocks
from fp8train.kernels.fused_op import fuses
from fp8train.numerics.block_scales import dequantize_blocks, from_blocks
from fp8train.numerics.cast import uncast
from fp8train.parallel.gradients.receivers import Places

_NORM_PIECE = 1 << 16
"""Elements of a CPU's piece of a norm: its FP64 copy stays in the cache."""


def norm_in_pieces(
    count: int,
    piece: Callable[[int, int], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    unit: int = 1,
) -> Tensor:
    """Euclidean norm of ``count`` elements in ``dtype``, scalar.

    torch widens a whole tensor before it takes a norm in another type: on a CPU that is ten times the time of
    pieces that stay in the cache, and memory of twice the gradient.

    Args:
        count: elements.
        piece: gives elements ``start .. stop``, any shape.
        dtype: of the arithmetic and the result.
        device: of the pieces; elsewhere than on a CPU there is one.
        unit: pieces start at multiples of this.
    """
    step = max(1, _NORM_PIECE // unit) * unit if device.type == "cpu" else max(1, count)
    norms = [
        torch.linalg.vector_norm(piece(start, min(start + step, count)), dtype=dtype)
        for start in range(0, count, step)
    ]
    if not norms:
        return torch.zeros((), dtype=dtype, device=device)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


class StoredGradient(NamedTuple):
    """A gradient as it lies in memory, for a kernel that decodes it itself.

    Attributes:
        values: contiguous: FP32 or BF16, flat; or FP8 codes [blocks, block], rows padded to whole blocks.
        scales: E8M0 bytes uint8 [blocks] of FP8 codes; None for values.
    """

    values: Tensor
    scales: Tensor | None = None

    @classmethod
    def of_values(cls, values: Tensor) -> StoredGradient | None:
        """Flat values, if they are FP32 or BF16."""
        return cls(values) if values.dtype in (torch.float32, torch.bfloat16) else None


class GradientReader(Protocol):
    """A reduced gradient as the optimizer reads it, a piece at a time: FP8 is never widened as a whole."""

    def chunk(self, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` of the local tensor in row-major order; not to be written to.

        Returns:
            FP32, or FP64 in FP64 runs, [stop - start].
        """
        ...

    def stored(self, count: int) -> StoredGradient | None:
        """The first ``count`` elements, whole rows, as they lie in memory; None where only :meth:`chunk`
        decodes them."""
        ...


class Held(Protocol):
    """The reduced gradients of a bucket; of each member the rows that this rank receives."""

    def chunk(self, member: int, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` of a member's rows on this rank: flat, FP32 (FP64 in FP64 runs), not to
        be written to."""
        ...

    def stored(self, member: int, start: int, stop: int) -> StoredGradient | None:
        """Elements ``start .. stop`` of a member's rows on this rank, whole rows, as they lie in memory; None
        where only :meth:`chunk` decodes them."""
        ...

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of each member's part, FP64 [members]; NaN if the gradient is not finite.
        ``dtype``: of the arithmetic, or narrower than it."""
        ...


@dataclass(frozen=True)
class HeldValues:
    """Reduced gradients in high precision.

    Attributes:
        parts: of each member, any shape; contiguous.
    """

    parts: Sequence[Tensor]

    def chunk(self, member: int, start: int, stop: int) -> Tensor:
        """Return elements ``start .. stop``: a view of FP32 and FP64 gradients, a copy in FP32 of others."""
        values = self.values(member)[start:stop]
        return values if values.dtype in (torch.float32, torch.float64) else values.float()

    def stored(self, member: int, start: int, stop: int) -> StoredGradient | None:
        """Elements ``start .. stop`` of FP32 and BF16 gradients."""
        return StoredGradient.of_values(self.values(member)[start:stop])

    def values(self, member: int) -> Tensor:
        """Return the memory of a member's gradient, flat: writing changes it."""
        return self.parts[member].view(-1)

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of each member's part, accumulated in ``dtype``: FP64 [members]."""
        if fuses(self.parts[0]):  # one launch for many small vectors
            parts = [self.values(member) for member in range(len(self.parts))]
            return torch.stack(torch._foreach_norm(parts, 2.0, dtype)).double()
        return torch.stack([self._norm(member, dtype) for member in range(len(self.parts))]).double()

    def _norm(self, member: int, dtype: torch.dtype) -> Tensor:
        flat = self.values(member)
        return norm_in_pieces(flat.numel(), lambda start, stop: flat[start:stop], dtype, flat.device)


@dataclass(frozen=True)
class HeldBlocks:
    """Reduced gradients as FP8 codes with block scales.

    Attributes:
        payload: FP8 [blocks, block].
        scales: E8M0 bytes uint8 [blocks].
        places: in blocks.
        ends: int64 [members], end of each member in ``payload``; padding is the last one's.
        squares: FP64 [members, n], which add up to the sum of squares of each member; None: not known yet.
    """

    payload: Tensor
    scales: Tensor
    places: Places
    ends: Tensor
    squares: Tensor | None = None

    def blocks(self, member: int) -> tuple[Tensor, Tensor]:
        """The codes and scales of a member's rows on this rank: (payload [blocks, block], scales
        [blocks])."""
        rows = self.places.held[member]
        return self.payload[rows], self.scales[rows]

    def chunk(self, member: int, start: int, stop: int) -> Tensor:
        """Decode the blocks that hold elements ``start .. stop`` to FP32; rows that end in a short block are
        cut out of it."""
        payload, scales = self.blocks(member)
        block, length = payload.shape[1], self.places.members[member].shape[-1]
        if length % block == 0:
            first, last = start // block, -(-stop // block)
            values = dequantize_blocks(payload[first:last], scales[first:last]).view(-1)
            return values[start - first * block : stop - first * block]
        per_row = -(-length // block)
        first, last = start // length, -(-stop // length)
        rows = slice(first * per_row, last * per_row)
        values = from_blocks(dequantize_blocks(payload[rows], scales[rows]), (last - first, length))
        return values.reshape(-1)[start - first * length : stop - first * length]

    def stored(self, member: int, start: int, stop: int) -> StoredGradient | None:
        """Codes and scales of the rows with elements ``start .. stop``; None where those cut a row."""
        payload, scales = self.blocks(member)
        length = self.places.members[member].shape[-1]
        if start % length or stop % length:
            return None
        per_row = -(-length // payload.shape[1])
        rows = slice(start // length * per_row, stop // length * per_row)
        return StoredGradient(payload[rows], scales[rows])

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of each member's part, FP64 [members]. Padding is zero and does not count. On a GPU
        the codes are read once, or not at all where their cast has added their squares up."""
        if not fuses(self.payload):
            return torch.stack([self._norm(i, dtype) for i in range(len(self.places.members))]).double()
        squares = self.squares
        if squares is None:
            squares = squares_of_blocks(self.payload, self.scales, self.ends)
        return squares.sum(dim=1).sqrt()

    def _norm(self, member: int, dtype: torch.dtype) -> Tensor:
        payload, scales = self.blocks(member)
        block = payload.shape[1]

        def decoded(start: int, stop: int) -> Tensor:
            blocks = slice(start // block, stop // block)
            return dequantize_blocks(payload[blocks], scales[blocks])

        return norm_in_pieces(payload.numel(), decoded, dtype, payload.device, unit=block)


@dataclass(frozen=True)
class HeldTensors:
    """Reduced gradients as FP8 codes with one scale per member.

    Attributes:
        payloads: FP8, flat, of each member.
        scale_inv: FP32 [members]; NaN where the gradient was not finite.
    """

    payloads: Sequence[Tensor]
    scale_inv: Tensor

    def chunk(self, member: int, start: int, stop: int) -> Tensor:
        """Decode elements ``start .. stop`` with the member's scale: FP32, flat."""
        return uncast(self.payloads[member][start:stop], self.scale_inv[member])

    def stored(self, member: int, start: int, stop: int) -> None:
        """Nothing: their scales are not those of blocks."""

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of each member's decoded part, FP64 [members]; NaN if its scale is."""
        return torch.stack([self._norm(member, dtype) for member in range(len(self.payloads))]).double()

    def _norm(self, member: int, dtype: torch.dtype) -> Tensor:
        payload, scale_inv = self.payloads[member], self.scale_inv[member]

        def decoded(start: int, stop: int) -> Tensor:
            return uncast(payload[start:stop], scale_inv)

        return norm_in_pieces(payload.numel(), decoded, dtype, payload.device)
