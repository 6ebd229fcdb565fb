"""Launcher of :mod:`fp8train.kernels.stored_weight`: tiles of blocks, as the optimizer step's. Where
transposed codes are written too, a tile is a block wide and 64 rows high, so that they come in runs of 64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import encode_fp8
from fp8train.kernels.gpu.elementwise import scale_constants
from fp8train.kernels.gpu.launch import launch
from fp8train.kernels.gpu.optimizer_update import load_blocks
from fp8train.kernels.gpu.tiles import operand_scale
from fp8train.kernels.operands import CastRule
from fp8train.kernels.optimizer_update import SCALED, rows_of_a_tile

_ROWS = 64


@triton.jit
def _cast_stored_kernel(
    codes,
    turned,
    scale_out,
    scale_inv_out,
    amax_out,
    payload,
    block_scale,
    amax,
    delayed,
    first_row,
    height,
    width,
    rows,
    columns,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    DELAYED: tl.constexpr,
    CONSTANT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MARGIN: tl.constexpr,
    MOST: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    scale, scale_inv, largest = operand_scale(
        amax, 1, delayed, DELAYED, CONSTANT, POWER_OF_TWO, MAX_EXPONENT, MARGIN, MOST
    )
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_out, scale)
        tl.store(scale_inv_out, scale_inv)
        tl.store(amax_out, largest)
    tile = tl.program_id(0).to(tl.int64)
    own, lane = tile * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, LANES)
    per_row = (width + BLOCK - 1) // BLOCK
    if STRAIGHT:  # rows are whole blocks, and nothing is padded: both sides are one run of memory
        block, exists = own, own < height * per_row
        start = tile * (BLOCKS * BLOCK)
        at = tl.arange(0, BLOCKS)[:, None] * BLOCK + lane[None, :]
        inside = exists[:, None] if LANES == BLOCK else exists[:, None] & (lane < BLOCK)[None, :]
        to = first_row * columns + start + at
    else:
        if TURNED:  # the same block of several rows
            row, column, exists = own, tl.program_id(1).to(tl.int64) * BLOCK + own * 0, own < height
            block = row * per_row + tl.program_id(1)
        else:
            row, column, exists = own // per_row, own % per_row * BLOCK, own < height * per_row
            block = own
        start = tile * 0
        at = (row * width + column)[:, None] + lane[None, :]
        inside = exists[:, None] & (lane[None, :] < tl.minimum(width - column, BLOCK)[:, None])
        to = ((first_row + row) * columns + column)[:, None] + lane[None, :]
    values = load_blocks(
        payload.to(tl.int64, bitcast=True),
        block_scale.to(tl.int64, bitcast=True),
        start,
        at,
        inside,
        block,
        exists,
        FORMAT,
        ALIGNED,
        HARDWARE,
    )
    code = encode_fp8(values * scale, MANTISSA, HARDWARE)
    tl.store(codes + to, code, mask=inside)
    if TURNED:
        line = tl.program_id(1).to(tl.int64) * BLOCK + lane
        back = line[:, None] * rows + (first_row + own)[None, :]
        tl.store(turned + back, tl.trans(code), mask=tl.trans(inside))


def cast_stored(
    codes: Tensor,
    turned: Tensor,
    scale_out: Tensor,
    scale_inv_out: Tensor,
    amax_out: Tensor,
    payload: Tensor,
    scale: Tensor | None,
    mantissa: int,
    block: int,
    amax: Tensor,
    delayed: Tensor | None,
    first_row: int,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    constant_exponent: int | None,
) -> None:
    """:func:`fp8train.kernels.stored_weight.cast_stored`: one read of the master, one write of each
    layout."""
    assert payload.is_contiguous() and codes.is_contiguous() and turned.is_contiguous()
    rule = CastRule(mantissa_bits, power_of_two, margin, constant_exponent)
    (height, width), both = payload.shape, turned.numel() > 0
    block = block if mantissa in SCALED else min(width, 128)
    per_row = triton.cdiv(width, block)
    aligned = all(x.data_ptr() % 16 == 0 for x in (payload, scale) if x is not None)
    straight = not both and width % block == 0 and codes.shape[1] == width and aligned
    blocks = _ROWS if both else rows_of_a_tile(block)
    launch(
        _cast_stored_kernel,
        (max(1, triton.cdiv(height if both else height * per_row, blocks)), max(1, per_row) if both else 1),
        codes.view(torch.uint8),
        turned.view(torch.uint8),
        scale_out,
        scale_inv_out,
        amax_out,
        payload.view(torch.uint8),
        payload.view(torch.uint8) if scale is None else scale.view(torch.uint8),
        amax,
        amax if delayed is None else delayed,
        first_row,
        height,
        width,
        *codes.shape,
        FORMAT=mantissa,
        BLOCK=block,
        LANES=triton.next_power_of_2(block),
        BLOCKS=blocks,
        ALIGNED=straight or (both and aligned),
        STRAIGHT=straight,
        TURNED=both,
        **scale_constants(amax.view(1), delayed, rule),
        num_warps=8 if both else 4,
    )
