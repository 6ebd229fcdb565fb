"""Launchers of :mod:`fp8train.kernels.group_operands`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import encode_fp8, largest_magnitude
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.gpu.tiles import own_scale, store_straight, store_turned
from fp8train.kernels.group_operands import (
    PART_COLUMNS,
    PART_ROWS,
    GroupOperand,
    GroupRule,
    TwoOperands,
    empty_group_operand,
    empty_two_operands,
    parts_of_columns,
    parts_of_rows,
)

_ROWS, _COLUMNS = 4, 1024
"""Of what a program holds of its rows at a time."""
_PARTS = 16
"""Partial amaxes that are read at a time."""


@triton.jit
def _cast_blocks(
    values,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MARGIN: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes of values [r, c] of any float type, and the inverse scales of blocks of ``BLOCK`` along ``AXIS``:
    [r, blocks] or [blocks, c]; of the whole tile, a scalar, for ``AXIS`` 2."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    values = values.to(tl.float32)
    if AXIS == 2:
        amax = largest_magnitude(largest_magnitude(values, 1), 0)
        scale, scale_inv = own_scale(amax, POWER_OF_TWO, MAX_EXPONENT, MARGIN)
        scaled = values * scale
    elif AXIS == 1:
        grouped = tl.reshape(values, (ROWS, COLUMNS // BLOCK, BLOCK))
        scale, scale_inv = own_scale(largest_magnitude(grouped, 2), POWER_OF_TWO, MAX_EXPONENT, MARGIN)
        scaled = tl.reshape(grouped * scale[:, :, None], (ROWS, COLUMNS))
    else:
        grouped = tl.reshape(values, (ROWS // BLOCK, BLOCK, COLUMNS))
        scale, scale_inv = own_scale(largest_magnitude(grouped, 1), POWER_OF_TWO, MAX_EXPONENT, MARGIN)
        scaled = tl.reshape(grouped * scale[:, None, :], (ROWS, COLUMNS))
    return encode_fp8(scaled, MANTISSA, HARDWARE), scale_inv


@triton.jit
def _store_scales(scale_inv, out, row, column, vectors, blocks, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Store scales of :func:`_cast_blocks`; ``out``: FP32 [blocks, vectors], or [rows of blocks, blocks] for
    ``AXIS`` 2. ``row``, ``column``: int64, of the tile's elements."""
    at, other = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if AXIS == 2:
        tl.store(out + at * blocks + other, scale_inv, mask=(at < vectors) & (other < blocks))
    elif AXIS == 1:
        block = other * scale_inv.shape[1] + tl.arange(0, scale_inv.shape[1])
        inside = (row < vectors)[:, None] & (block < blocks)[None, :]
        tl.store(out + block[None, :] * vectors + row[:, None], scale_inv, mask=inside)
    else:
        block = at * scale_inv.shape[0] + tl.arange(0, scale_inv.shape[0])
        inside = (block < blocks)[:, None] & (column < vectors)[None, :]
        tl.store(out + block[:, None] * vectors + column[None, :], scale_inv, mask=inside)


@triton.jit
def _blocks_kernel(
    x,
    straight,
    turned,
    first_scales,
    second_scales,
    height,
    width,
    rows,
    columns,
    first_vectors,
    first_blocks,
    second_vectors,
    second_blocks,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MARGIN: tl.constexpr,
    HARDWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """``FIRST``: axis of the blocks of codes in either layout; ``SECOND``: of transposed ones, if others."""
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    inside = (row < height)[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0)
    code, scale_inv = _cast_blocks(
        values, FIRST, BLOCK, POWER_OF_TWO, MANTISSA, MAX_EXPONENT, MARGIN, HARDWARE
    )
    _store_scales(scale_inv, first_scales, row, column, first_vectors, first_blocks, FIRST, BLOCK)
    if STRAIGHT:
        store_straight(code, straight, row, column, rows, columns)
    if TURNED:
        if SECOND is not None:
            code, scale_inv = _cast_blocks(
                values, SECOND, BLOCK, POWER_OF_TWO, MANTISSA, MAX_EXPONENT, MARGIN, HARDWARE
            )
            _store_scales(scale_inv, second_scales, row, column, second_vectors, second_blocks, SECOND, BLOCK)
        store_turned(code, turned, row, column, rows, columns)


@triton.jit
def _rows_kernel(
    x,
    straight,
    turned,
    scales,
    height,
    width,
    rows,
    columns,
    vectors,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MARGIN: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Whole rows with a scale each: the second read of a row finds it in the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros((ROWS, COLUMNS), tl.uint32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        found = tl.maximum(found, values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)
    amax = tl.max(found, axis=1).to(tl.float32, bitcast=True)
    scale, scale_inv = own_scale(amax, POWER_OF_TWO, MAX_EXPONENT, MARGIN)
    tl.store(scales + row, scale_inv, mask=row < vectors)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        code = encode_fp8(values * scale[:, None], MANTISSA, HARDWARE)
        if STRAIGHT:
            store_straight(code, straight, row, column, rows, columns)
        if TURNED:
            store_turned(code, turned, row, column, rows, columns)


@triton.jit
def _parts_kernel(
    x,
    row_parts,
    column_parts,
    height,
    width,
    tiles,
    OF_ROWS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Partial amaxes: ``row_parts`` FP32 [tiles along K, M], ``column_parts`` [programs along M, K]; a
    program takes every so many tiles of its columns."""
    column = tl.program_id(1).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    found = tl.zeros((TILE_M, TILE_K), tl.uint32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * TILE_M + tl.arange(0, TILE_M).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]
        values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        bits = values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        found = tl.maximum(found, bits)
        if OF_ROWS:
            part = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
            tl.store(row_parts + tl.program_id(1).to(tl.int64) * height + row, part, mask=row < height)
    part = tl.max(found, axis=0).to(tl.float32, bitcast=True)
    tl.store(column_parts + tl.program_id(0).to(tl.int64) * width + column, part, mask=column < width)


@triton.jit
def _amax_of_parts(parts, count, vector, size, PARTS: tl.constexpr):
    """Amaxes of vectors from their parts, FP32 [count, size]; 0 beyond ``size``."""
    LENGTH: tl.constexpr = vector.shape[0]
    found = tl.zeros((PARTS, LENGTH), tl.uint32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS).to(tl.int64)
        inside = (part < count)[:, None] & (vector < size)[None, :]
        values = tl.load(parts + part[:, None] * size + vector[None, :], mask=inside, other=0.0)
        found = tl.maximum(found, values.to(tl.uint32, bitcast=True))
    return tl.max(found, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _vectors_kernel(
    x,
    row_parts,
    row_count,
    column_parts,
    column_count,
    straight,
    turned,
    row_scales,
    column_scales,
    height,
    width,
    rows,
    columns,
    row_vectors,
    column_vectors,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    OF_ROWS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MARGIN: tl.constexpr,
    HARDWARE: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Codes with the scales of columns; with ``OF_ROWS`` the straight ones have those of rows instead."""
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    inside = (row < height)[:, None] & (column < width)[None, :]
    values = tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = _amax_of_parts(column_parts, column_count, column, width, PARTS)
    scale, scale_inv = own_scale(amax, POWER_OF_TWO, MAX_EXPONENT, MARGIN)
    if tl.program_id(0) == 0:
        tl.store(column_scales + column, scale_inv, mask=column < column_vectors)
    code = encode_fp8(values * scale[None, :], MANTISSA, HARDWARE)
    if TURNED:
        store_turned(code, turned, row, column, rows, columns)
    if STRAIGHT:
        if OF_ROWS:
            amax = _amax_of_parts(row_parts, row_count, row, height, PARTS)
            scale, scale_inv = own_scale(amax, POWER_OF_TWO, MAX_EXPONENT, MARGIN)
            if tl.program_id(1) == 0:
                tl.store(row_scales + row, scale_inv, mask=row < row_vectors)
            code = encode_fp8(values * scale[:, None], MANTISSA, HARDWARE)
        store_straight(code, straight, row, column, rows, columns)


def _constants(rule: GroupRule) -> dict[str, object]:
    return {
        "POWER_OF_TWO": rule.power_of_two,
        "MANTISSA": rule.mantissa_bits,
        "MAX_EXPONENT": rule.format.max_exponent,
        "MARGIN": rule.margin,
        "HARDWARE": hardware(),
    }


def _aligned(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[0] // 16) * 16, -(-x.shape[1] // 16) * 16


def _grid(sizes: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Programs of a matrix; at least one, for its scales exist where it is empty."""
    return max(1, triton.cdiv(sizes[0], rows)), max(1, triton.cdiv(sizes[1], columns))


def _vectors(
    x: Tensor,
    rule: GroupRule,
    straight: Tensor,
    turned: Tensor,
    row_scales: Tensor | None,
    column_scales: Tensor,
) -> None:
    """Casts with scales of columns, and, given ``row_scales``, straight codes with those of rows."""
    height, width = x.shape
    of_rows, sizes = row_scales is not None, _aligned(x)
    column_count, row_count = parts_of_columns(height), parts_of_rows(width)
    column_parts = x.new_empty((column_count, width), dtype=torch.float32)
    row_parts = x.new_empty((row_count, height) if of_rows else 0, dtype=torch.float32)
    launch(
        _parts_kernel,
        (column_count, row_count),
        x,
        row_parts,
        column_parts,
        height,
        width,
        triton.cdiv(height, PART_ROWS),
        OF_ROWS=of_rows,
        TILE_M=PART_ROWS,
        TILE_K=PART_COLUMNS,
        num_warps=8,
    )
    launch(
        _vectors_kernel,
        _grid(sizes, PART_ROWS, PART_COLUMNS),
        x,
        row_parts,
        row_count,
        column_parts,
        column_count,
        straight.view(torch.uint8),
        turned.view(torch.uint8),
        column_scales if row_scales is None else row_scales,
        column_scales,
        height,
        width,
        *sizes,
        1 if row_scales is None else row_scales.shape[0],
        column_scales.shape[1],
        STRAIGHT=straight.dim() == 2,
        TURNED=turned.dim() == 2,
        OF_ROWS=of_rows,
        **_constants(rule),
        PARTS=_PARTS,
        TILE_M=PART_ROWS,
        TILE_K=PART_COLUMNS,
        num_warps=8,
    )


def _blocks(
    x: Tensor,
    rule: GroupRule,
    straight: Tensor,
    turned: Tensor,
    first: tuple[int, Tensor],
    second: tuple[int, Tensor] | None = None,
) -> None:
    """Casts with scales of blocks: ``first`` is axis and scales of all codes, ``second`` of transposed ones
    that differ."""
    sizes = _aligned(x)
    others = first if second is None else second
    tile, warps = _tile(rule, first[0], second is not None)
    launch(
        _blocks_kernel,
        _grid(sizes, *tile),
        x,
        straight.view(torch.uint8),
        turned.view(torch.uint8),
        first[1],
        others[1],
        *x.shape,
        *sizes,
        *_vectors_and_blocks(first),
        *_vectors_and_blocks(others),
        STRAIGHT=straight.dim() == 2,
        TURNED=turned.dim() == 2,
        FIRST=first[0],
        SECOND=None if second is None else second[0],
        BLOCK=rule.block,
        **_constants(rule),
        TILE_M=tile[0],
        TILE_K=tile[1],
        num_warps=warps,
    )


def _tile(rule: GroupRule, axis: int, both: bool) -> tuple[tuple[int, int], int]:
    """Rows and columns of a program's tile, which holds whole blocks, and its warps: 32 elements a thread.
    Larger tiles for two casts in 1x32 would not fit registers."""
    if rule.block == 32:
        return ((32, 128), 4) if both else ((64, 128), 8)
    if both or axis == 2:
        return (128, 128), 16
    return ((64, 128), 8) if axis == 1 else ((128, 64), 8)


def _vectors_and_blocks(scales: tuple[int, Tensor]) -> tuple[int, int]:
    axis, (rows, columns) = scales[0], scales[1].shape
    return (columns, rows) if axis == 0 else (rows, columns)


def cast_groups(
    x: Tensor,
    granularity: str,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    contracted: int,
    straight: bool,
    turned: bool,
) -> GroupOperand:
    """:func:`fp8train.kernels.group_operands.cast_groups`: one write of each layout."""
    assert x.is_contiguous(), f"strides {x.stride()}"
    rule = GroupRule(granularity, mantissa_bits, power_of_two, margin)  # type: ignore[arg-type]
    out = empty_group_operand(x, rule, contracted, straight, turned)
    if rule.granularity != "row":
        axis = 2 if rule.granularity == "block_128x128" else contracted
        _blocks(x, rule, out.codes, out.turned, (axis, out.scale_inv))
    elif contracted == 0:
        _vectors(x, rule, out.codes, out.turned, None, out.scale_inv)
    else:
        sizes = _aligned(x)
        # Transposed, a program's codes make one line of memory for each column: long enough from 64 rows on.
        at_a_time = (64, 64) if turned else (_ROWS, _COLUMNS)
        launch(
            _rows_kernel,
            (max(1, triton.cdiv(sizes[0], at_a_time[0])),),
            x,
            out.codes.view(torch.uint8),
            out.turned.view(torch.uint8),
            out.scale_inv,
            *x.shape,
            *sizes,
            out.scale_inv.shape[0],
            STRAIGHT=straight,
            TURNED=turned,
            **_constants(rule),
            ROWS=at_a_time[0],
            COLUMNS=at_a_time[1],
            num_warps=4,
        )
    return out


def cast_both(
    x: Tensor, granularity: str, mantissa_bits: int, power_of_two: bool, margin: int
) -> TwoOperands:
    """:func:`fp8train.kernels.group_operands.cast_both`: one write of each cast."""
    assert x.is_contiguous(), f"strides {x.stride()}"
    rule = GroupRule(granularity, mantissa_bits, power_of_two, margin)  # type: ignore[arg-type]
    out = empty_two_operands(x, rule)
    if rule.granularity == "row":
        _vectors(x, rule, out.codes, out.turned, out.scale_inv, out.turned_scale_inv)
    else:
        _blocks(x, rule, out.codes, out.turned, (1, out.scale_inv), (0, out.turned_scale_inv))
    return out
