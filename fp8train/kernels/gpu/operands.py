"""Launchers of :mod:`fp8train.kernels.operands`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import largest_magnitude
from fp8train.kernels.gpu.elementwise import Tiles, larger_magnitude
from fp8train.kernels.gpu.launch import launch
from fp8train.kernels.gpu.tiles import TILE_COLUMNS, TILE_ROWS
from fp8train.kernels.operands import CastOperand, CastRule, count_of_partials

_BLOCK = 4096


@triton.jit
def _amax_kernel(x, partials, numel, programs, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK, numel, programs * BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        values = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float32)
        found = larger_magnitude(found, values)
    tl.store(partials + program, largest_magnitude(found, 0))


def amax_partials(x: Tensor) -> Tensor:
    """:func:`fp8train.kernels.operands.amax_partials`: one read of ``x``."""
    assert x.is_contiguous(), f"strides {x.stride()}"
    programs = count_of_partials(x.numel())
    partials = x.new_empty(programs, dtype=torch.float32)
    launch(_amax_kernel, (programs,), x, partials, x.numel(), programs, BLOCK=_BLOCK, num_warps=8)
    return partials


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


@triton.jit
def _values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    x, width = inputs
    return tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


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
    rule = CastRule(mantissa_bits, power_of_two, margin, constant_exponent)
    tiles = Tiles(_values, (x, x.shape[1]), x, (x.shape[0], x.shape[1]))
    return tiles.cast(partials, delayed, rule, straight, turned)
