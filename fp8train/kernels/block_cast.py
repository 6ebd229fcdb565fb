"""Casts to FP8 with block scales, and norms of what they gave (:mod:`fp8train.numerics.block_scales`).

A block is a run of one row, so one program sees all of it: amax, scale and codes take one launch, in which
each element is read once and written once as a byte. What else is known of the codes then costs no pass over
memory: what the cast lost (error feedback), and the sum of squares of what the codes stand for.

Sums of squares are kept in FP64 by *segment*, a run of blocks; those of a gradient bucket are its parameters.
Up to 1024 programs share a segment, and each leaves one number, so sums have the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.numerics.block_scales import as_blocks, dequantize_blocks, quantize_blocks
from fp8train.numerics.formats import dtype_of, format_of
from fp8train.precision.number_formats import E4M3, E5M2, Format

PARTIALS = 1024
"""Most partial sums of one segment."""
TILE = 4096
"""Elements that a program has in hand at once."""


def format_of_bits(mantissa_bits: int) -> Format:
    """The FP8 format with this many mantissa bits."""
    return E4M3 if mantissa_bits == E4M3.mantissa_bits else E5M2


def count_of_partials(blocks: int, block: int) -> int:
    """How many partial sums a segment has where all segments together have ``blocks`` blocks."""
    return max(1, min(PARTIALS, -(-blocks * block // TILE)))


def _segments(ends: Tensor | None, blocks: int) -> list[slice]:
    stops = [blocks] if ends is None else ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def _sums_of_squares(
    payload: Tensor, scales: Tensor, ends: Tensor | None, out: Tensor, values: Tensor | None = None
) -> None:
    """FP64 sums of squares into the first of each segment's partials in ``out``."""
    values = dequantize_blocks(payload, scales) if values is None else values
    out.zero_()
    for segment, rows in enumerate(_segments(ends, len(payload))):
        out[segment, 0] = values[rows].double().square().sum()


def _cast_blocks(
    x: Tensor,
    residual: Tensor | None,
    ends: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    lost: Tensor | None,
    squares: Tensor | None,
    mantissa_bits: int,
) -> None:
    block = codes.shape[1]
    blocks = as_blocks(x, block)
    if residual is not None:
        blocks = blocks.float() + residual
    payload, exponents = quantize_blocks(blocks, format_of_bits(mantissa_bits))
    codes.copy_(payload.view(torch.uint8))
    scales.copy_(exponents)
    if lost is None and squares is None:
        return
    values = dequantize_blocks(payload, exponents)
    if squares is not None:
        _sums_of_squares(payload, exponents, ends, squares, values)
    if lost is not None:
        lost.copy_((blocks - values).to(torch.bfloat16))


def _cast_blocks_fake(
    x: Tensor,
    residual: Tensor | None,
    ends: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    lost: Tensor | None,
    squares: Tensor | None,
    mantissa_bits: int,
) -> None:
    return None


_cast_op = FusedOp(
    _cast_blocks,
    launcher="fp8train.kernels.gpu.block_cast:cast_blocks",
    fake=_cast_blocks_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:3]), nbytes(*args[3:7])),
    mutates=("codes", "scales", "lost", "squares"),
)


def cast_blocks_into(
    x: Tensor,
    payload: Tensor,
    scales: Tensor,
    *,
    residual: Tensor | None = None,
    lost: Tensor | None = None,
    squares: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    """Quantise rows block by block into memory that is there: ``quantize_blocks(as_blocks(x, block) +
    residual)``.

    Args:
        x: [.., K], BF16, FP16 or FP32.
        payload: FP8 [rows · ceil(K / block), block], written.
        scales: E8M0 bytes uint8 [rows · ceil(K / block)], written.
        residual: BF16 like ``payload``, added in FP32 before the cast.
        lost: BF16 like ``payload``; receives what the cast lost.
        squares: FP64 [segments, 1 to 1024]; receives numbers that add up, along a row, to the sum of squares
            of the decoded codes of a segment.
        ends: int64 [segments], where each segment ends, in blocks; they begin at 0 and cover all. None: there
            is one segment.
    """
    rows, bits = x.reshape(-1, x.shape[-1]).contiguous(), format_of(payload.dtype).mantissa_bits
    _cast_op(rows, residual, ends, payload.view(torch.uint8), scales, lost, squares, bits)


def cast_blocks(x: Tensor, block: int, fmt: Format) -> tuple[Tensor, Tensor]:
    """Quantise rows block by block: ``quantize_blocks(as_blocks(x, block), fmt)``.

    Args:
        x: [.., K], BF16, FP16 or FP32.
        block: elements of a block.
        fmt: payload format.

    Returns:
        (payload [rows · ceil(K / block), block], E8M0 bytes uint8 [rows · ceil(K / block)]).
    """
    blocks = x.numel() // max(1, x.shape[-1]) * -(-x.shape[-1] // block)
    payload = x.new_empty((blocks, block), dtype=torch.uint8).view(dtype_of(fmt))
    scales = x.new_empty(blocks, dtype=torch.uint8)
    cast_blocks_into(x, payload, scales)
    return payload, scales


def _squares_of_blocks(payload: Tensor, scales: Tensor, ends: Tensor | None) -> Tensor:
    out = _squares_of_blocks_fake(payload, scales, ends)
    _sums_of_squares(payload, scales, ends, out)
    return out


def _squares_of_blocks_fake(payload: Tensor, scales: Tensor, ends: Tensor | None) -> Tensor:
    segments = 1 if ends is None else len(ends)
    return payload.new_empty((segments, count_of_partials(*payload.shape)), dtype=torch.float64)


_squares_op = FusedOp(
    _squares_of_blocks,
    launcher="fp8train.kernels.gpu.block_cast:squares_of_blocks",
    fake=_squares_of_blocks_fake,
    cost=lambda args, out: Cost(1, nbytes(*args), nbytes(out)),
)


def squares_of_blocks(payload: Tensor, scales: Tensor, ends: Tensor | None = None) -> Tensor:
    """Sums of squares of what codes stand for, by segment: one read of the codes.

    Args:
        payload: FP8 [blocks, block].
        scales: E8M0 bytes uint8 [blocks].
        ends: as for :func:`cast_blocks_into`.

    Returns:
        FP64 [segments, 1 to 1024], which add up along rows; NaN where a scale is.
    """
    result: Tensor = _squares_op(payload, scales, ends)
    return result
