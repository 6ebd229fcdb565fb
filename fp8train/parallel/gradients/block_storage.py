"""Gradients stored as FP8 codes with block scales: 1 + 1/block bytes per element between steps.

Micro-batches add up in BF16 or FP32 and are cast once, when the last one is in (adding in FP8 with rounding
to nearest swamps small contributions: 20 dB left after 32 micro-batches). With a single micro-batch there is
nothing to add: each gradient is cast as it is produced and no accumulator exists.

**Error feedback** (Seide et al. 2014) adds what the last cast lost to the next step's gradient. What a step
loses counts only if the step is applied, and only as far as it is applied: clipping multiplies the gradient
that the optimizer sees, so it multiplies what was lost of it. A step that is skipped leaves the residual as
it was. Until that is known, the loss of the running step is kept beside the residual.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8train.comm.exchange import Quantized
from fp8train.numerics.block_scales import as_blocks, decode_e8m0, dequantize_blocks, quantize_blocks
from fp8train.numerics.formats import dtype_of
from fp8train.parallel.gradients.bucket import Storage
from fp8train.parallel.gradients.held import HeldBlocks
from fp8train.parallel.gradients.receivers import Member, Places
from fp8train.parallel.gradients.recorder import GradientRecorder
from fp8train.precision.number_formats import Format


def row_blocks(members: Sequence[Member], block: int) -> list[int]:
    """Scale blocks of one row of each member; a short last one counts."""
    return [-(-member.shape[-1] // block) for member in members]


class BlockStorage(Storage):
    """Keeps a bucket's gradients as FP8 codes with block scales.

    The block matrix of a bucket is the block matrices of its members, one after the other, and zeros up to a
    multiple of the ranks that share it.

    Attributes:
        residual: BF16 [blocks, block], what casts of applied steps lost; None without error feedback.
    """

    def __init__(
        self,
        places: Places,
        *,
        block: int,
        fmt: Format,
        accumulate: torch.dtype | None,
        error_feedback: bool = False,
        recorder: GradientRecorder | None = None,
        device: torch.device,
    ) -> None:
        """Allocate codes, scales, and where they are asked for the accumulator and the residual: all zero.

        Args:
            places: in blocks; members' rows have blocks of ``block`` elements.
            block: elements that share a scale.
            fmt: of the codes.
            accumulate: BF16 or FP32 accumulator over micro-batches; None with one micro-batch.
            error_feedback: see the module; 2 bytes an element, and 2 more while a step runs.
            recorder: receives statistics of the cast of each member on sampled steps.
            device: where it lives.
        """
        self.places = places
        self._format, self._block, self._recorder = fmt, block, recorder
        shape = (places.total, block)
        self._payload = torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype_of(fmt))
        self._scales = torch.full((places.total,), 127, dtype=torch.uint8, device=device)
        self._accumulator = (
            None if accumulate is None else torch.zeros(shape, dtype=accumulate, device=device)
        )
        self.residual = torch.zeros(shape, dtype=torch.bfloat16, device=device) if error_feedback else None
        self._lost: Tensor | None = None

    @property
    def stored_bytes(self) -> int:
        """Codes, scales, and the residual of error feedback."""
        residual = 0 if self.residual is None else self.residual.nbytes
        return self._payload.nbytes + self._scales.nbytes + residual

    @property
    def accumulator_bytes(self) -> int:
        """The accumulator, and what error feedback keeps beside the residual until a step is applied."""
        lost = 0 if self.residual is None else self.residual.nbytes
        return lost + (0 if self._accumulator is None else self._accumulator.nbytes)

    def begin(self) -> None:
        """Forget what a step lost that was not applied."""
        self._lost = None if self.residual is None else torch.zeros_like(self.residual)

    def _matrix(self, member: int, blocks: Tensor) -> Tensor:
        """The member's part of a block matrix as a view of its shape (rows may be longer in memory)."""
        shape = self.places.members[member].shape
        padded = -(-shape[-1] // self._block) * self._block
        return blocks[self.places.whole[member]].view(*shape[:-1], padded)[..., : shape[-1]]

    def buffer(self, member: int) -> Tensor:
        """The member's part of the accumulator, or of the codes (uint8) where there is none; a view of the
        parameter's shape."""
        blocks = self._payload.view(torch.uint8) if self._accumulator is None else self._accumulator
        return self._matrix(member, blocks)

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Add a micro-batch's gradient to the accumulator, or cast the step's only one to FP8 at once."""
        if self._accumulator is None:
            assert first, "FP8 blocks without an accumulator take one contribution a step"
            self._cast(self.places.whole[member], as_blocks(gradient, self._block))
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
        if self._lost is not None:
            self._lost[rows] = (blocks - dequantize_blocks(payload, scales)).to(torch.bfloat16)

    def _record(self, rows: slice, blocks: Tensor, payload: Tensor, scales: Tensor) -> None:
        """Statistics of the members whose blocks are ``rows``; zeros that pad short rows count as zeros."""
        assert self._recorder is not None
        for member, own in zip(self.places.members, self.places.whole, strict=True):
            if rows.start <= own.start and own.stop <= rows.stop:
                part = slice(own.start - rows.start, own.stop - rows.start)
                self._recorder.record(
                    member.fqn, blocks[part], payload[part], decode_e8m0(scales[part]).unsqueeze(-1)
                )

    def codes(self) -> Quantized:
        """Cast what has added up, if it is not cast yet, and return it: (payload [blocks, block], scales
        [blocks])."""
        if self._accumulator is not None:
            self._cast(slice(0, len(self._payload)), self._accumulator)
        return self._payload, self._scales

    def stored(self) -> Quantized:
        """The codes and scales that are kept, as they are: (payload [blocks, block], scales [blocks])."""
        return self._payload, self._scales

    def hold_codes(self, payload: Tensor, scales: Tensor) -> HeldBlocks:
        """Keep the quantised sums over ranks in place of this rank's own: FP8 [blocks, block] and uint8
        [blocks]."""
        if payload is not self._payload:
            self._payload.view(torch.uint8).copy_(payload.view(torch.uint8))
            self._scales.copy_(scales)
        return HeldBlocks(self._payload, self._scales, self.places)

    def wide(self) -> Tensor:
        """This rank's sums before any cast, [blocks, block]."""
        assert self._accumulator is not None
        return self._accumulator

    def hold(self, sums: Tensor) -> HeldBlocks:
        """Cast and keep the sums over ranks, [blocks, block] in high precision."""
        self._cast(slice(0, len(self._payload)), sums)
        return HeldBlocks(self._payload, self._scales, self.places)

    def commit(self, clip: Tensor | None) -> None:
        """The step was applied, its gradient multiplied by ``clip``: what it lost becomes the residual.

        Args:
            clip: device scalar; None stands for 1.
        """
        if self.residual is not None:
            assert self._lost is not None, "no step has begun"
            # Not a scalar: those take the other operand's type, and the factor has more than BF16's 8 bits.
            self.residual.copy_(self._lost if clip is None else self._lost * clip.float().view(1, 1))
            self._lost = None
