"""Kernels of :class:`~fp8train.kernels.tiled.TiledValues`: written once, for every formula.

A formula is a device function that computes a tile from a tuple of pointers and numbers,
``VALUES(inputs, row, column, inside, OPTION, HARDWARE)``, where ``OPTION`` is whatever it is compiled for. It
returns FP32 values that are rounded to the first input's dtype.

Formulas whose results come in pairs from the same inputs (gate and up, the two halves of a rotated head)
return two tiles: with ``UNIT``, pair c lies in columns ``c // UNIT · 2·UNIT + c % UNIT`` and ``UNIT`` later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import largest_magnitude, narrow, widen
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.gpu.tiles import TILE_COLUMNS, TILE_ROWS, operand_scale, store_operand
from fp8train.kernels.operands import PARTIALS, CastOperand, CastRule, count_of_partials, empty_operand
from fp8train.kernels.tiled import cut


@triton.jit
def round_like(x, like, HARDWARE: tl.constexpr):
    """FP32 values of the dtype (BF16 or FP32) that the pointer ``like`` has, to nearest even."""
    if like.dtype.element_ty == tl.float32:
        return x
    tl.static_assert(like.dtype.element_ty == tl.bfloat16, "BF16 or FP32")
    return widen(narrow(x, HARDWARE), HARDWARE)


@triton.jit
def larger_magnitude(found, x):
    """The larger of two magnitudes, elementwise; NaN if either is. ``found`` is not negative."""
    bits = tl.maximum(found.to(tl.uint32, bitcast=True), x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def first_of_pair(column, UNIT: tl.constexpr):
    """Column of the first of a pair."""
    return column // UNIT * (2 * UNIT) + column % UNIT


@triton.jit
def _forward_kernel(
    inputs,
    out,
    height,
    width,
    VALUES: tl.constexpr,
    OPTION: tl.constexpr,
    UNIT: tl.constexpr,
    HARDWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    column = tl.program_id(1).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
    if UNIT is None:
        inside = (row < height)[:, None] & (column < width)[None, :]
        values = VALUES(inputs, row, column, inside, OPTION, HARDWARE)
        tl.store(out + row[:, None] * width + column[None, :], values, mask=inside)
    else:
        first = first_of_pair(column, UNIT)
        inside = (row < height)[:, None] & (first < width)[None, :]
        one, two = VALUES(inputs, row, column, inside, OPTION, HARDWARE)
        at = row[:, None] * width + first[None, :]
        tl.store(out + at, one, mask=inside)
        tl.store(out + at + UNIT, two, mask=inside)


@triton.jit
def _amax_kernel(
    inputs,
    partials,
    height,
    width,
    tiles,
    across,
    programs,
    VALUES: tl.constexpr,
    OPTION: tl.constexpr,
    UNIT: tl.constexpr,
    HARDWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    found = tl.zeros((TILE_M, TILE_K), tl.float32)
    for tile in range(tl.program_id(0), tiles, programs):
        row = (tile // across).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
        column = (tile % across).to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
        if UNIT is None:
            inside = (row < height)[:, None] & (column < width)[None, :]
            values = VALUES(inputs, row, column, inside, OPTION, HARDWARE)
            found = larger_magnitude(found, tl.where(inside, values, 0.0))
        else:
            inside = (row < height)[:, None] & (first_of_pair(column, UNIT) < width)[None, :]
            one, two = VALUES(inputs, row, column, inside, OPTION, HARDWARE)
            found = larger_magnitude(found, tl.where(inside, one, 0.0))
            found = larger_magnitude(found, tl.where(inside, two, 0.0))
    tl.store(partials + tl.program_id(0), largest_magnitude(tl.ravel(found), 0))


@triton.jit
def _cast_kernel(
    inputs,
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
    VALUES: tl.constexpr,
    OPTION: tl.constexpr,
    UNIT: tl.constexpr,
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
    if UNIT is None:
        inside = (row < height)[:, None] & (column < width)[None, :]
        values = tl.where(inside, VALUES(inputs, row, column, inside, OPTION, HARDWARE), 0.0)
        store_operand(
            values, scale, row, column, straight, turned, rows, columns, STRAIGHT, TURNED, MANTISSA, HARDWARE
        )
    else:
        first = first_of_pair(column, UNIT)
        inside = (row < height)[:, None] & (first < width)[None, :]
        one, two = VALUES(inputs, row, column, inside, OPTION, HARDWARE)
        one, two = tl.where(inside, one, 0.0), tl.where(inside, two, 0.0)
        store_operand(
            one, scale, row, first, straight, turned, rows, columns, STRAIGHT, TURNED, MANTISSA, HARDWARE
        )
        store_operand(
            two,
            scale,
            row,
            first + UNIT,
            straight,
            turned,
            rows,
            columns,
            STRAIGHT,
            TURNED,
            MANTISSA,
            HARDWARE,
        )


def scale_constants(partials: Tensor, delayed: Tensor | None, rule: CastRule) -> dict[str, Any]:
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


class Tiles(NamedTuple):
    """A formula with its inputs.

    Attributes:
        values: the device function; see the module.
        inputs: what it unpacks.
        like: tensor with the dtype and device of the result.
        shape: of the result.
        unit: of pairs, or None.
        option: what else the formula is compiled for.
        warps: 16 leave a thread half as many elements as 8, for formulas that need registers.
    """

    values: Any
    inputs: tuple[Any, ...]
    like: Tensor
    shape: tuple[int, int]
    unit: int | None = None
    option: Any = None
    warps: int = 8

    def _constants(self) -> dict[str, Any]:
        """What all three kernels are compiled for. Two tiles in registers have half the columns each."""
        return {
            "VALUES": self.values,
            "OPTION": self.option,
            "UNIT": self.unit,
            "HARDWARE": hardware(),
            "TILE_M": TILE_ROWS,
            "TILE_K": TILE_COLUMNS if self.unit is None else TILE_COLUMNS // 2,
            "num_warps": self.warps,
        }

    def _grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Tiles of a result of this size, padding included."""
        tile = TILE_COLUMNS
        if self.unit is not None:  # units are whole: half of 2·UNIT columns each
            columns, tile = triton.cdiv(columns, 2 * self.unit) * self.unit, tile // 2
        return triton.cdiv(rows, TILE_ROWS), triton.cdiv(columns, tile)

    def forward(self) -> Tensor:
        """Compute the values alone."""
        out = torch.empty(self.shape, dtype=self.like.dtype, device=self.like.device)
        launch(_forward_kernel, self._grid(*self.shape), self.inputs, out, *self.shape, **self._constants())
        return out

    def amax(self) -> Tensor:
        """Partials of the values."""
        down, across = self._grid(*self.shape)
        programs = count_of_partials(self.shape[0] * self.shape[1])
        partials = torch.empty(programs, dtype=torch.float32, device=self.like.device)
        launch(
            _amax_kernel,
            (programs,),
            self.inputs,
            partials,
            *self.shape,
            down * across,
            across,
            programs,
            **self._constants(),
        )
        return partials

    def cast(
        self, partials: Tensor, delayed: Tensor | None, rule: CastRule, straight: bool, turned: bool
    ) -> CastOperand:
        """The values as an operand."""
        assert partials.numel() <= PARTIALS
        out = empty_operand(self.like, self.shape, rule, straight, turned)
        rows, columns = (-(-size // 16) * 16 for size in self.shape)
        down, across = self._grid(rows, columns)
        launch(
            _cast_kernel,
            (max(1, down), max(1, across)),  # of an empty result too: it has a scale
            self.inputs,
            partials,
            partials.numel(),
            partials if delayed is None else delayed,
            out.codes.view(torch.uint8),
            out.turned.view(torch.uint8),
            out.scale_inv,
            out.amax,
            *self.shape,
            rows,
            columns,
            STRAIGHT=straight,
            TURNED=turned,
            **scale_constants(partials, delayed, rule) | self._constants(),
        )
        return out


def launchers(tiles: Callable[..., Tiles]) -> tuple[Callable[..., Any], ...]:
    """The launchers (forward, amax, cast) of a formula, from what makes its :class:`Tiles` of its inputs."""

    def cast(*args: Any) -> CastOperand:
        inputs, (partials, delayed, *rule, straight, turned) = cut(args)
        return tiles(*inputs).cast(partials, delayed, CastRule(*rule), straight, turned)

    return lambda *inputs: tiles(*inputs).forward(), lambda *inputs: tiles(*inputs).amax(), cast
