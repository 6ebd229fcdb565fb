"""Launchers of :mod:`fp8train.kernels.scaling`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.launch import launch
from fp8train.kernels.scaling import empty_mx_scales, empty_square_scales

_BLOCK = 2048


@triton.jit
def _mx_kernel(scale_inv, out, row_stride, column_stride, height, width, across, size, BLOCK: tl.constexpr):
    """``out``: E8M0 bytes [size], tiles of 128 rows and 4 columns, ``across`` of them side by side."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tile, byte = at // 512, at % 512
    row = tile // across * 128 + byte // 4 % 4 * 32 + byte // 16
    column = tile % across * 4 + byte % 4
    inside = (row < height) & (column < width)
    values = tl.load(scale_inv + row * row_stride + column * column_stride, mask=inside, other=0.0)
    exponent = (values.to(tl.uint32, bitcast=True) >> 23) & 0xFF
    tl.store(out + at, exponent.to(tl.uint8), mask=at < size)


def mx_scales(scale_inv: Tensor) -> Tensor:
    """:func:`fp8train.kernels.scaling.mx_scales`: one read, one write."""
    out = empty_mx_scales(scale_inv)
    height, width = scale_inv.shape
    size, across = out.numel(), triton.cdiv(width, 4)
    launch(
        _mx_kernel,
        (triton.cdiv(size, _BLOCK),),
        scale_inv,
        out.view(torch.uint8),
        *scale_inv.stride(),
        height,
        width,
        across,
        size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out


@triton.jit
def _square_kernel(scale_inv, out, row_stride, column_stride, width, padded, size, BLOCK: tl.constexpr):
    """``out``: FP32 [size], rows of ``padded`` scales."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // padded, at % padded
    inside = (at < size) & (column < width)
    values = tl.load(scale_inv + row * row_stride + column * column_stride, mask=inside, other=0.0)
    tl.store(out + at, values, mask=at < size)


def square_scales(scale_inv: Tensor) -> Tensor:
    """:func:`fp8train.kernels.scaling.block_scales` of blocks of 128x128: one read, one write."""
    out = empty_square_scales(scale_inv)
    size = out.numel()
    launch(
        _square_kernel,
        (triton.cdiv(size, _BLOCK),),
        scale_inv,
        out,
        *scale_inv.stride(),
        scale_inv.shape[1],
        out.shape[0],
        size,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out
