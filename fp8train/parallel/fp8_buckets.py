"""Gradients stored as FP8 codes with block scales.

Micro-batches add up in BF16 or FP32 and are cast once, when the last one is in (adding in FP8 with rounding
to nearest swamps small contributions: 20 dB left after 32 micro-batches). With a single micro-batch there is
nothing to add: each gradient is cast as it is produced and no accumulator exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import Quantized, padded_blocks
from fp8train.numerics.blocks import as_blocks, decode_e8m0, dequantize_blocks, from_blocks, quantize_blocks
from fp8train.numerics.formats import Format
from fp8train.parallel.buckets import GradientReader, GradientRecorder, Member


class BlockReduction(Protocol):
    """How quantised block matrices of all ranks become their sum; see :mod:`fp8train.comm.exchange`."""

    def start(self, payload: Tensor, scales: Tensor) -> None:
        """Post the first communication: FP8 [blocks, block], uint8 [blocks]."""
        ...

    def advance(self) -> object:
        """Do what it enables and post the next."""
        ...

    def finish(self) -> Quantized:
        """The quantised sum."""
        ...


class Fp8Bucket:
    """Gradients as FP8 codes with block scales: 1 + 1/block bytes per element between steps.

    The block matrix of a bucket is the block matrices of its members, one after the other, and zeros up to a
    multiple of the ranks that share it.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        block: int,
        fmt: Format,
        accumulate: torch.dtype | None,
        reduction: BlockReduction | None,
        parts: int,
        error_feedback: bool = False,
        recorder: GradientRecorder | None = None,
        device: torch.device,
    ) -> None:
        """Allocate.

        Args:
            members: parameters whose rows have blocks of ``block`` elements.
            block: elements that share a scale.
            fmt: of the codes.
            accumulate: BF16 or FP32 accumulator over micro-batches; None with one micro-batch.
            reduction: over the ranks; None for one rank.
            parts: the number of blocks is padded to a multiple of this.
            error_feedback: add what the last cast lost to the next step's gradient (BF16, 2 bytes an
                element; Seide et al. 2014).
            recorder: receives statistics of the cast of each member on sampled steps.
            device: where it lives.
        """
        self.members = members
        self._format, self._block, self._reduction, self._recorder = fmt, block, reduction, recorder
        self._ranges: list[slice] = []
        end = 0
        for member in members:
            blocks = member.numel // member.shape[-1] * -(-member.shape[-1] // block)
            self._ranges.append(slice(end, end + blocks))
            end += blocks
        total = padded_blocks(end, parts)
        self._payload = torch.zeros(total, block, dtype=torch.uint8, device=device).view(fmt.dtype)
        self._scales = torch.full((total,), 127, dtype=torch.uint8, device=device)
        self._accumulator = (
            None if accumulate is None else torch.zeros(total, block, dtype=accumulate, device=device)
        )
        self.residual = (
            torch.zeros(total, block, dtype=torch.bfloat16, device=device) if error_feedback else None
        )
        self._reduced = False

    @property
    def stored_bytes(self) -> int:
        """See :class:`~fp8train.parallel.buckets.Bucket`; the residual of error feedback counts."""
        residual = 0 if self.residual is None else self.residual.nbytes
        return self._payload.nbytes + self._scales.nbytes + residual

    @property
    def accumulator_bytes(self) -> int:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return 0 if self._accumulator is None else self._accumulator.nbytes

    def _matrix(self, member: int, blocks: Tensor) -> Tensor:
        """The member's part of a block matrix as a view of its shape (rows may be longer in memory)."""
        shape = self.members[member].shape
        padded = -(-shape[-1] // self._block) * self._block
        return blocks[self._ranges[member]].view(*shape[:-1], padded)[..., : shape[-1]]

    def buffer(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        blocks = self._payload.view(torch.uint8) if self._accumulator is None else self._accumulator
        return self._matrix(member, blocks)

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        self._reduced = False
        if self._accumulator is None:
            assert first, "an FP8 bucket without an accumulator takes one contribution a step"
            self._cast(self._ranges[member], as_blocks(gradient, self._block))
        elif first:
            self._matrix(member, self._accumulator).copy_(gradient)
        else:
            self._matrix(member, self._accumulator).add_(gradient)

    def _cast(self, rows: slice, blocks: Tensor) -> None:
        if self.residual is not None:
            blocks = blocks.float() + self.residual[rows]
        payload, scales = quantize_blocks(blocks, self._format)
        if self._recorder is not None and self._recorder.active:
            self._record(rows, blocks, payload, scales)
        self._payload.view(torch.uint8)[rows] = payload.view(torch.uint8)
        self._scales[rows] = scales
        if self.residual is not None:
            lost = blocks - dequantize_blocks(payload, scales)
            self.residual[rows] = torch.where(torch.isfinite(lost), lost, 0.0).to(torch.bfloat16)

    def _record(self, rows: slice, blocks: Tensor, payload: Tensor, scales: Tensor) -> None:
        """Statistics of the members whose blocks are ``rows``; zeros that pad short rows count as zeros."""
        assert self._recorder is not None
        for member, own in zip(self.members, self._ranges, strict=True):
            if rows.start <= own.start and own.stop <= rows.stop:
                part = slice(own.start - rows.start, own.stop - rows.start)
                self._recorder.record(
                    member.fqn, blocks[part], payload[part], decode_e8m0(scales[part]).unsqueeze(-1)
                )

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        if self._accumulator is not None:
            self._cast(slice(0, len(self._payload)), self._accumulator)
        if self._reduction is not None:
            self._reduction.start(self._payload, self._scales)

    def advance(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        if self._reduction is not None:
            self._reduction.advance()

    def finish(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        if self._reduction is not None:
            payload, scales = self._reduction.finish()
            self._payload.view(torch.uint8).copy_(payload.view(torch.uint8))
            self._scales.copy_(scales)
        self._reduced = True

    def stored(self, member: int) -> Quantized:
        """The member's (payload [blocks, block], E8M0 scales [blocks])."""
        rows = self._ranges[member]
        return self._payload[rows], self._scales[rows]

    def reader(self, member: int) -> GradientReader:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        return _BlockReader(*self.stored(member), self.members[member].shape)

    def grad(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; FP32."""
        if not self._reduced and self._accumulator is not None:
            return self._matrix(member, self._accumulator).float()
        return from_blocks(dequantize_blocks(*self.stored(member)), self.members[member].shape)

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`. Padding is zero and does not count."""
        return torch.linalg.vector_norm(dequantize_blocks(*self.stored(member)), dtype=dtype)


class WideReducedFp8Bucket(Fp8Bucket):
    """FP8 storage, but the sum over ranks travels in BF16 or FP32: what FP8 traffic is compared with."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        block: int,
        fmt: Format,
        accumulate: torch.dtype,
        reduce: torch.dtype,
        group: CountedGroup,
        recorder: GradientRecorder | None = None,
        device: torch.device,
    ) -> None:
        """As :class:`Fp8Bucket`; ``reduce``: dtype on the wire."""
        super().__init__(
            members,
            block=block,
            fmt=fmt,
            accumulate=accumulate,
            reduction=None,
            parts=1,
            recorder=recorder,
            device=device,
        )
        self._reduce, self._group = reduce, group
        self._wire: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        assert self._accumulator is not None
        same = self._accumulator.dtype == self._reduce
        self._wire = self._accumulator if same else self._accumulator.to(self._reduce)
        self._wait = self._group.all_reduce(self._wire, purpose="gradient_fp8_plan")

    def finish(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        assert self._wait is not None
        assert self._wire is not None
        self._wait()
        self._cast(slice(0, len(self._payload)), self._wire)
        self._wire = self._wait = None
        self._reduced = True


@dataclass(frozen=True)
class _BlockReader:
    payload: Tensor
    scales: Tensor
    shape: tuple[int, ...]

    def chunk(self, start: int, stop: int) -> Tensor:
        """Decode the blocks that hold the elements; rows that end in a short block are cut out of it."""
        block, length = self.payload.shape[1], self.shape[-1]
        if length % block == 0:
            first, last = start // block, -(-stop // block)
            values = dequantize_blocks(self.payload[first:last], self.scales[first:last]).view(-1)
            return values[start - first * block : stop - first * block]
        per_row = -(-length // block)
        first, last = start // length, -(-stop // length)
        rows = slice(first * per_row, last * per_row)
        values = from_blocks(
            dequantize_blocks(self.payload[rows], self.scales[rows]), (last - first, length)
        ).reshape(-1)
        return values[start - first * length : stop - first * length]
