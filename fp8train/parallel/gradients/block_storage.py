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

from fp8train.kernels.block_cast import cast_blocks_into, count_of_partials
from fp8train.kernels.exchange_sum import Quantized
from fp8train.kernels.fused_op import fuses
from fp8train.numerics.block_scales import as_blocks, decode_e8m0
from fp8train.numerics.formats import dtype_of
from fp8train.parallel.gradients.bucket import Storage
from fp8train.parallel.gradients.held import HeldBlocks
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import Member, Places
from fp8train.parallel.gradients.recorder import GradientRecorder
from fp8train.precision.number_formats import Format

_SCALE_1 = 127  # E8M0


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
        own_norms: bool = False,
        memory: Memory,
    ) -> None:
        """Allocate codes, scales, and where they are asked for the accumulator and the residual: all zero.

        Args:
            places: in blocks; members' rows have blocks of ``block`` elements.
            block: elements that share a scale.
            fmt: of the codes.
            accumulate: BF16 or FP32 accumulator over micro-batches; None with one micro-batch.
            error_feedback: see the module; 2 bytes an element, and 2 more while a step runs.
            recorder: receives statistics of the cast of each member on sampled steps.
            own_norms: what is cast here is what the optimizer reads, so the cast adds up its squares; on a
                CPU it does not, which finds norms in pieces that fit its cache.
            memory: of codes, scales and accumulator.
        """
        self.places = places
        self._format, self._block, self._recorder = fmt, block, recorder
        shape = (places.total, block)
        device = memory.device
        self._payload = memory.zeros("codes", shape, torch.uint8).view(dtype_of(fmt))
        self._scales = memory.full("scales", (places.total,), _SCALE_1, torch.uint8)
        self._accumulator = None if accumulate is None else memory.zeros("sums", shape, accumulate)
        elements = sum(member.numel for member in places.members)
        self._refills = memory.shared and elements < places.total * block
        self.residual = torch.zeros(shape, dtype=torch.bfloat16, device=device) if error_feedback else None
        self._lost = None if self.residual is None else torch.zeros_like(self.residual)
        ends = [place.stop for place in places.whole]
        self._ends = torch.tensor([*ends[:-1], places.total], device=device)  # the last one's has the padding
        self._squares: Tensor | None = None
        if own_norms and fuses(self._payload):
            partials = len(ends), count_of_partials(*shape)
            self._squares = torch.zeros(partials, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._payload.device

    @property
    def stored_bytes(self) -> int:
        """Codes, scales, and the residual of error feedback."""
        residual = 0 if self.residual is None else self.residual.nbytes
        return self._payload.nbytes + self._scales.nbytes + residual

    @property
    def scale_bytes(self) -> int:
        """A byte for each block."""
        return self._scales.nbytes

    @property
    def accumulator_bytes(self) -> int:
        """The accumulator, and what error feedback keeps beside the residual until a step is applied."""
        lost = 0 if self._lost is None else self._lost.nbytes
        return lost + (0 if self._accumulator is None else self._accumulator.nbytes)

    def begin(self) -> None:
        """Forget what a step lost that was not applied. What pads rows and the whole is zero again, wherever
        others wrote."""
        if self._refills:
            self._payload.view(torch.uint8).zero_()
            self._scales.fill_(_SCALE_1)
            if self._accumulator is not None:
                self._accumulator.zero_()
        if self._lost is not None:  # in place: a CUDA graph writes there
            self._lost.zero_()

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
            self._cast(gradient, member)
        elif first:
            self._matrix(member, self._accumulator).copy_(gradient)
        else:
            self._matrix(member, self._accumulator).add_(gradient)

    def _cast(self, x: Tensor, member: int | None) -> None:
        """Cast a member's gradient, or (None) the block matrix of all."""
        rows, squares = slice(0, self.places.total), self._squares
        if member is not None:
            rows = self.places.whole[member]
            squares = None if squares is None else squares[member : member + 1]
        payload, scales = self._payload[rows], self._scales[rows]
        residual = None if self.residual is None else self.residual[rows]
        cast_blocks_into(
            x,
            payload,
            scales,
            residual=residual,
            lost=None if self._lost is None else self._lost[rows],
            squares=squares,
            ends=self._ends if member is None and squares is not None else None,
        )
        if self._recorder is not None and self._recorder.active:
            blocks = as_blocks(x, self._block)
            self._record(rows, blocks if residual is None else blocks.float() + residual, payload, scales)

    def _record(self, rows: slice, blocks: Tensor, payload: Tensor, scales: Tensor) -> None:
        """Statistics of the members whose blocks are ``rows``; zeros that pad short rows count as zeros."""
        assert self._recorder is not None
        for member, own in zip(self.places.members, self.places.whole, strict=True):
            if rows.start <= own.start and own.stop <= rows.stop:
                part = slice(own.start - rows.start, own.stop - rows.start)
                self._recorder.record(
                    member.fqn, blocks[part], payload[part], decode_e8m0(scales[part]).unsqueeze(-1)
                )

    def own_sum(self) -> Tensor:
        """Sum the accumulator, else codes and scales, which are NaN where the source is not finite."""
        if self._accumulator is not None:
            return self._accumulator.sum(dtype=torch.float32)
        return decode_e8m0(self._scales).sum() + self._payload.view(torch.int8).sum()

    def codes(self) -> Quantized:
        """Cast what has added up, if it is not cast yet, and return it: (payload [blocks, block], scales
        [blocks])."""
        if self._accumulator is not None:
            self._cast(self._accumulator, None)
        return self._payload, self._scales

    def stored(self) -> Quantized:
        """The codes and scales that are kept, as they are: (payload [blocks, block], scales [blocks])."""
        return self._payload, self._scales

    def hold_codes(self) -> HeldBlocks:
        """The codes and scales that are kept, as the optimizer reads them: this rank's own, or sums over
        ranks that a reduction wrote into :meth:`stored`."""
        return HeldBlocks(self._payload, self._scales, self.places, self._ends, self._squares)

    def wide(self) -> Tensor:
        """This rank's sums before any cast, [blocks, block]."""
        assert self._accumulator is not None
        return self._accumulator

    def hold(self, sums: Tensor) -> HeldBlocks:
        """Cast and keep the sums over ranks, [blocks, block] in high precision."""
        self._cast(sums, None)
        return self.hold_codes()

    def commit(self, clip: Tensor | None) -> None:
        """The step was applied, its gradient multiplied by ``clip``: what it lost becomes the residual.

        Args:
            clip: device scalar; None stands for 1.
        """
        if self.residual is not None:
            assert self._lost is not None
            if clip is None:
                self.residual.copy_(self._lost)
            else:  # not a scalar: those take the other operand's type, and the factor has more than 8 bits
                torch.mul(self._lost, clip.float().view(1, 1), out=self.residual)
