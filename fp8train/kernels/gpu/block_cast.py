"""Launchers of :mod:`fp8train.kernels.block_cast`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.block_cast import TILE, count_of_partials, format_of_bits
from fp8train.kernels.gpu.codes import (
    decode_e8m0,
    decode_fp8,
    encode_e8m0,
    encode_fp8,
    exponent_from_amax,
    is_finite,
    largest_magnitude,
    narrow,
    pow2,
    widen,
)
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.numerics.formats import format_of


@triton.jit
def encode_blocks(values, MANTISSA: tl.constexpr, MAX_EXPONENT: tl.constexpr, HARDWARE: tl.constexpr):
    """(codes [r, c], E8M0 bytes [r]) of FP32 values, a block to a row; lanes outside of a block are 0."""
    amax = largest_magnitude(values, 1)
    finite = is_finite(amax)
    k = exponent_from_amax(tl.where(finite, amax, 0.0), MAX_EXPONENT)
    return encode_fp8(values * pow2(k)[:, None], MANTISSA, HARDWARE), encode_e8m0(-k, finite)


@triton.jit
def decode_blocks(codes, scales, MANTISSA: tl.constexpr):
    """FP32 values of codes [r, c] with E8M0 bytes [r]."""
    return decode_fp8(codes, MANTISSA) * decode_e8m0(scales)[:, None]


@triton.jit
def _segment(ends, blocks, SEGMENTS: tl.constexpr):
    """First block of this program's segment, and the one after its last."""
    segment = tl.program_id(1)
    if SEGMENTS:
        start = tl.load(ends + segment - 1, mask=segment > 0, other=0)
        stop = tl.load(ends + segment)
    else:
        start = tl.full((), 0, tl.int64)
        stop = tl.full((), 0, tl.int64) + blocks
    return start, stop


@triton.jit
def _cast_kernel(
    x,
    residual,
    ends,
    codes,
    scales,
    lost,
    squares,
    blocks,
    length,
    block,
    per_row,
    programs,
    RAGGED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LOST: tl.constexpr,
    SQUARES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    start, stop = _segment(ends, blocks, SEGMENTS)
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float64)
    for first in range(start + tl.program_id(0) * ROWS, stop, programs * ROWS):
        number = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (number < stop)[:, None] & (column < block)
        at = number[:, None] * block + column
        if RAGGED:  # rows end in a short block, as if zeros followed
            row, begin = number // per_row, number % per_row * block
            there = inside & (begin[:, None] + column < length)
            source = (row * length + begin)[:, None] + column
        else:
            there, source = inside, at
        values = widen(tl.load(x + source, mask=there, other=0.0), HARDWARE)
        if RESIDUAL:
            values += widen(tl.load(residual + at, mask=inside, other=0.0), HARDWARE)
        code, exponent = encode_blocks(values, MANTISSA, MAX_EXPONENT, HARDWARE)
        tl.store(codes + at, code, mask=inside)
        tl.store(scales + number, exponent, mask=number < stop)
        if LOST or SQUARES:
            decoded = decode_blocks(code, exponent, MANTISSA)
            if LOST:
                tl.store(lost + at, narrow(values - decoded, HARDWARE), mask=inside)
            if SQUARES:
                wide = decoded.to(tl.float64)
                total += wide * wide
    if SQUARES:
        here = tl.program_id(1) * programs + tl.program_id(0)
        tl.store(squares + here, tl.sum(tl.sum(total, axis=1), axis=0))


def shape_of_tile(block: int, elements: int = TILE) -> dict[str, int]:
    """``ROWS`` blocks of up to ``WIDTH`` elements, powers of two."""
    width = triton.next_power_of_2(block)
    return {"ROWS": max(1, elements // width), "WIDTH": width}


def cast_blocks(
    x: Tensor,
    residual: Tensor | None,
    ends: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    lost: Tensor | None,
    squares: Tensor | None,
    mantissa_bits: int,
) -> None:
    """:func:`fp8train.kernels.block_cast.cast_blocks_into`: one read of ``x``, one write of the codes."""
    assert all(t.is_contiguous() for t in (x, codes, scales)), "strided"
    blocks, block = codes.shape
    length = x.shape[1]
    programs = count_of_partials(blocks, block) if squares is None else squares.shape[1]
    launch(
        _cast_kernel,
        (programs, 1 if ends is None else len(ends)),
        x,
        x if residual is None else residual,
        scales if ends is None else ends,
        codes,
        scales,
        x if lost is None else lost,
        scales if squares is None else squares,
        blocks,
        length,
        block,
        -(-length // block),
        programs,
        RAGGED=length % block != 0,
        RESIDUAL=residual is not None,
        LOST=lost is not None,
        SQUARES=squares is not None,
        SEGMENTS=ends is not None,
        MANTISSA=mantissa_bits,
        MAX_EXPONENT=format_of_bits(mantissa_bits).max_exponent,
        HARDWARE=hardware(),
        **shape_of_tile(block),
        num_warps=8,
    )


@triton.jit
def _squares_kernel(
    codes,
    scales,
    ends,
    out,
    blocks,
    block,
    programs,
    SEGMENTS: tl.constexpr,
    MANTISSA: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    start, stop = _segment(ends, blocks, SEGMENTS)
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float64)
    for first in range(start + tl.program_id(0) * ROWS, stop, programs * ROWS):
        number = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (number < stop)[:, None] & (column < block)
        code = tl.load(codes + number[:, None] * block + column, mask=inside, other=0)
        exponent = tl.load(scales + number, mask=number < stop, other=127)
        wide = decode_blocks(code, exponent, MANTISSA).to(tl.float64)
        total += wide * wide
    here = tl.program_id(1) * programs + tl.program_id(0)
    tl.store(out + here, tl.sum(tl.sum(total, axis=1), axis=0))


def squares_of_blocks(payload: Tensor, scales: Tensor, ends: Tensor | None) -> Tensor:
    """:func:`fp8train.kernels.block_cast.squares_of_blocks`: one read of the codes."""
    assert payload.is_contiguous()
    blocks, block = payload.shape
    programs, segments = count_of_partials(blocks, block), 1 if ends is None else len(ends)
    out = payload.new_empty((segments, programs), dtype=torch.float64)
    launch(
        _squares_kernel,
        (programs, segments),
        payload.view(torch.uint8),
        scales,
        scales if ends is None else ends,
        out,
        blocks,
        block,
        programs,
        SEGMENTS=ends is not None,
        MANTISSA=format_of(payload.dtype).mantissa_bits,
        **shape_of_tile(block),
        num_warps=8,
    )
    return out
