"""Launchers of :mod:`fp8train.kernels.operands`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import largest_magnitude
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.gpu.tiles import TILE_COLUMNS, TILE_ROWS, operand_scale, store_operand
from fp8train.kernels.operands import PARTIALS, CastOperand, CastRule, count_of_partials, empty_operand

_BLOCK = 4096


@triton.jit
def _amax_kernel(x, partials, numel, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * BLOCK, numel, programs * BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        values = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float32)
        bits = tl.maximum(found.to(tl.uint32, bitcast=True), values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)
        found = bits.to(tl.float32, bitcast=True)
    tl.store(partials + program, largest_magnitude(found, 0))


def amax_partials(x: Tensor) -> Tensor:
    """:func:`fp8train.kernels.operands.amax_partials`: one read of ``x``."""
    assert x.is_contiguous(), f"strides {x.stride()}"
    programs = count_of_partials(x.numel())
    partials = x.new_empty(programs, dtype=torch.float32)
    launch(_amax_kernel, (programs,), x, partials, x.numel(), programs, BLOCK=_BLOCK, num_warps=8)
    return partials


@triton.jit
def _cast_kernel(
    x,
    partials,
    count,
    delayed,
    straight,
    turned,
    scale_inv_out,
    amax_out,
    height,
    width,
    rows,
    columns,
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
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    scale, scale_inv, amax = operand_scale(
        partials, count, delayed, DELAYED, CONSTANT, POWER_OF_TWO, MAX_EXPONENT, MARGIN, MOST
    )
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_inv_out, scale_inv)
        tl.store(amax_out, amax)
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    inside = (row < height)[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    store_operand(
        values, scale, row, column, straight, turned, rows, columns, STRAIGHT, TURNED, MANTISSA, HARDWARE
    )


@triton.jit
def _turn_kernel(codes, turned, rows, columns, TILE_M: tl.constexpr, TILE_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(codes + row[:, None] * columns + column[None, :], mask=inside)
    tl.store(turned + column[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def turn_codes(codes: Tensor) -> Tensor:
    """:func:`fp8train.kernels.operands.turn_codes`: one read, one write."""
    assert codes.is_contiguous(), f"strides {codes.stride()}"
    rows, columns = codes.shape
    turned = codes.new_empty(columns, rows)
    grid = (triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, TILE_COLUMNS))
    launch(
        _turn_kernel,
        grid,
        codes.view(torch.uint8),
        turned.view(torch.uint8),
        rows,
        columns,
        TILE_M=TILE_ROWS,
        TILE_K=TILE_COLUMNS,
        num_warps=8,
    )
    return turned


def scale_constants(partials: Tensor, delayed: Tensor | None, rule: CastRule) -> dict[str, object]:
    """The compile-time constants of :func:`~fp8train.kernels.gpu.tiles.operand_scale` and of the cast."""
    return {
        "DELAYED": delayed is not None,
        "CONSTANT": rule.constant_exponent,
        "POWER_OF_TWO": rule.power_of_two,
        "MANTISSA": rule.mantissa_bits,
        "MAX_EXPONENT": rule.format.max_exponent,
        "MARGIN": rule.margin,
        "MOST": min(PARTIALS, triton.next_power_of_2(partials.numel())),
        "HARDWARE": hardware(),
    }


def cast_operand(
    x: Tensor,
    partials: Tensor,
    delayed: Tensor | None,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    constant_exponent: int | None,
    straight: bool,
    turned: bool,
) -> CastOperand:
    """:func:`fp8train.kernels.operands.cast_operand`: one read of ``x``, one write of each layout."""
    assert x.is_contiguous(), f"strides {x.stride()}"
    assert partials.numel() <= PARTIALS
    rule = CastRule(mantissa_bits, power_of_two, margin, constant_exponent)
    height, width = x.shape
    out = empty_operand(x, (height, width), rule, straight, turned)
    rows, columns = -(-height // 16) * 16, -(-width // 16) * 16
    grid = (max(1, triton.cdiv(rows, TILE_ROWS)), max(1, triton.cdiv(columns, TILE_COLUMNS)))
    launch(
        _cast_kernel,
        grid,
        x,
        partials,
        partials.numel(),
        partials if delayed is None else delayed,
        out.codes.view(torch.uint8),
        out.turned.view(torch.uint8),
        out.scale_inv,
        out.amax,
        height,
        width,
        rows,
        columns,
        STRAIGHT=straight,
        TURNED=turned,
        **scale_constants(partials, delayed, rule),
        TILE_M=TILE_ROWS,
        TILE_K=TILE_COLUMNS,
        num_warps=8,
    )
    return out
