"""Launchers of :mod:`fp8train.kernels.cross_entropy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import narrow, widen
from fp8train.kernels.gpu.launch import hardware, launch

_TILE = 4096


@triton.jit
def _load_scores(logits, at, inside, alpha, SCALED: tl.constexpr, HARDWARE: tl.constexpr):
    """FP32 logits times ``alpha``; -infinity outside."""
    x = widen(tl.load(logits + at, mask=inside, other=0.0), HARDWARE)
    if SCALED:
        x = x * alpha
    return tl.where(inside, x, float("-inf"))


@triton.jit
def _finite_base(largest):
    """What exponents are taken above: the maximum, or 0 where nothing was seen yet."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _store(pointer, x, mask, HARDWARE: tl.constexpr):
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, narrow(x, HARDWARE), mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


@triton.jit
def _statistics_kernel(
    logits,
    column,
    largest_out,
    total_out,
    score_out,
    width,
    real,
    alpha,
    SCALED: tl.constexpr,
    HARDWARE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * width
    at = tl.arange(0, TILE)
    # Each lane has a maximum and a sum of its own: no reduction over the program until the end. A NaN is no
    # maximum, but makes the sum NaN.
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, real, TILE):
        x = _load_scores(own, first + at, first + at < real, alpha, SCALED, HARDWARE)
        above = tl.maximum(largest, x)
        base = _finite_base(above)
        total = total * tl.exp(largest - base) + tl.exp(x - base)
        largest = above
    top = tl.max(largest, axis=0)
    tl.store(largest_out + row, top)
    tl.store(total_out + row, tl.sum(total * tl.exp(largest - _finite_base(top)), axis=0))
    target = tl.load(column + row)
    tl.store(score_out + row, _load_scores(own, target, target < real, alpha, SCALED, HARDWARE))


def _tile(width: int) -> int:
    return max(16, min(_TILE, triton.next_power_of_2(width)))


def softmax_statistics(
    logits: Tensor, column: Tensor, real: int, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fp8train.kernels.cross_entropy.softmax_statistics`: one read of the logits."""
    assert logits.is_contiguous() and column.is_contiguous()
    largest, total, score = (logits.new_empty(column.shape, dtype=torch.float32) for _ in range(3))
    launch(
        _statistics_kernel,
        (len(logits),),
        logits,
        column,
        largest,
        total,
        score,
        logits.shape[1],
        real,
        alpha,
        SCALED=alpha != 1.0,
        HARDWARE=hardware(),
        TILE=_tile(real),
        num_warps=8,
    )
    return largest, total, score


@triton.jit
def _gradient_kernel(
    logits,
    largest,
    total,
    column,
    weight,
    here,
    out,
    width,
    real,
    alpha,
    SCALED: tl.constexpr,
    HARDWARE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = _load_scores(logits + row * width, at, at < real, alpha, SCALED, HARDWARE)
    factor = tl.div_rn(tl.load(weight + row), tl.load(total + row))
    gradient = tl.exp(x - tl.load(largest + row)) * factor
    gradient -= tl.where(at == tl.load(column + row), tl.load(here + row), 0.0)
    _store(out + row * width + at, gradient, at < width, HARDWARE)


def softmax_gradient(
    logits: Tensor,
    largest: Tensor,
    total: Tensor,
    column: Tensor,
    weight: Tensor,
    here: Tensor,
    real: int,
    alpha: float,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`fp8train.kernels.cross_entropy.softmax_gradient`: one read of the logits, one write."""
    assert all(x.is_contiguous() for x in (logits, largest, total, column, weight, here))
    rows, width = logits.shape
    out = logits.new_empty(logits.shape, dtype=dtype)
    tile = _tile(width)
    launch(
        _gradient_kernel,
        (rows, triton.cdiv(width, tile)),
        logits,
        largest,
        total,
        column,
        weight,
        here,
        out,
        width,
        real,
        alpha,
        SCALED=alpha != 1.0,
        HARDWARE=hardware(),
        TILE=tile,
        num_warps=8,
    )
    return out


@triton.jit
def _times_kernel(x, factor, out, numel, HARDWARE: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = widen(tl.load(x + at, mask=at < numel, other=0.0), HARDWARE)
    _store(out + at, values * tl.load(factor), at < numel, HARDWARE)


def times_factor(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fp8train.kernels.cross_entropy.times_factor`: one read, one write."""
    assert x.is_contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    grid = (triton.cdiv(x.numel(), _TILE),)
    launch(_times_kernel, grid, x, factor, out, x.numel(), HARDWARE=hardware(), TILE=_TILE, num_warps=8)
    return out
