"""FP8 matrix multiplication without FP8 units: operands are decoded and multiplied in a wider type.

Every FP8 value is exact in BF16, and so is its product with a power of two in range; where they are not in
range, or not powers of two, or the result is to be scaled by another number, FP32 serves. One scale per
tensor multiplies the smaller operand or the product; scales of rows and blocks multiply their operands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8train.kernels.matmul import cpu_multiplies_bf16
from fp8train.numerics.cast import decode_finite
from fp8train.numerics.granularity import expand_scales

_FOLD_RANGE = (2.0**-90, 2.0**6)
_ARRAY_FOLD_RANGE = (2.0**-50, 2.0**40)
"""Scales that go into BF16 operands. BF16 instructions flush subnormal operands and products, so the smallest
product, of subnormals of E4M3 and E5M2, 2^-25, must stay normal: above 2^-126 with one scale (11 binades to
spare), and with two of them (one to spare). The upper ends are far from overflow."""


def decode_gemm(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    alpha: float,
    pow2: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """``alpha · scale_inv_a · scale_inv_b · (a @ b)``.

    Args:
        a: FP8 payload [M, K], any strides; or values of a wider type, which are multiplied as they are.
        b: FP8 payload [K, N], any strides.
        scale_inv_a: FP32 scalar, or of rows or blocks of ``a``.
        scale_inv_b: likewise of ``b``.
        alpha: the GEMM's own multiplier.
        pow2: all scales are powers of two.
        out_dtype: BF16, FP32 or FP64.

    Returns:
        [M, N] in ``out_dtype``.
    """
    if scale_inv_a.dim() or scale_inv_b.dim():
        return _decode_arrays(a, b, scale_inv_a, scale_inv_b, alpha, pow2, out_dtype)
    on_cpu = a.device.type == "cpu"
    in_bf16 = out_dtype == torch.bfloat16 and pow2 and alpha == 1.0
    in_bf16 = in_bf16 and not (on_cpu and not cpu_multiplies_bf16())
    work = torch.bfloat16 if in_bf16 else torch.float64 if out_dtype == torch.float64 else torch.float32
    if not on_cpu:  # the scales stay on the device: no host sync
        a, b = _values(a, work), _values(b, work)
        return ((a @ b) * (alpha * scale_inv_a.double() * scale_inv_b.double())).to(out_dtype)
    factor = alpha * float(scale_inv_a) * float(scale_inv_b)
    if in_bf16 and folds(factor):
        # Exact on the smaller operand; outside the range it could leave BF16's normal numbers.
        if a.numel() <= b.numel():
            return _scaled(a, factor, work) @ _values(b, work)
        return _values(a, work) @ _scaled(b, factor, work)
    return _times(_values(a, work) @ _values(b, work), factor).to(out_dtype)


def folds(factor: float) -> bool:
    """Whether a GEMM's one factor, a power of two, is multiplied into a BF16 operand."""
    return _FOLD_RANGE[0] <= factor <= _FOLD_RANGE[1]


def _values(payload: Tensor, work: torch.dtype) -> Tensor:
    return decode_finite(payload, work) if payload.element_size() == 1 else payload.to(work)


def _scaled(payload: Tensor, scales: Tensor | float, work: torch.dtype) -> Tensor:
    """``payload · scales`` in ``work``; in place where that is not the caller's memory."""
    values = _values(payload, work)
    return values.mul_(scales) if payload.element_size() == 1 else values * scales


def _times(product: Tensor, factor: float) -> Tensor:
    """``product · factor`` in place, for factors outside FP32's range too (there 0 · factor must stay 0)."""
    if product.dtype != torch.float64 and math.isfinite(factor):
        if abs(factor) > 2.0**127:
            return product.mul_(2.0**127).mul_(factor * 2.0**-127)
        if abs(factor) < 2.0**-126:
            return product.mul_(2.0**-126).mul_(factor * 2.0**126)
    return product.mul_(factor)


def _decode_arrays(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    alpha: float,
    pow2: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The ``decode`` implementation where an operand has an array of scales."""
    in_bf16 = out_dtype == torch.bfloat16 and pow2 and alpha == 1.0
    if in_bf16 and a.device.type == "cpu":  # elsewhere a look at the scales would wait for the device
        in_bf16 = cpu_multiplies_bf16() and array_folds(scale_inv_a) and array_folds(scale_inv_b)
    work = torch.bfloat16 if in_bf16 else torch.float64 if out_dtype == torch.float64 else torch.float32
    a, b = (
        _scaled(payload, expand_scales(scale_inv.to(work), payload.shape), work)
        for payload, scale_inv in ((a, scale_inv_a), (b, scale_inv_b))
    )
    return (a @ b if alpha == 1.0 else (a @ b).mul_(alpha)).to(out_dtype)


def array_folds(scale_inv: Tensor) -> bool:
    """Whether scales of rows or blocks, powers of two, are multiplied into their BF16 operand."""
    low, high = torch.aminmax(scale_inv)
    return _ARRAY_FOLD_RANGE[0] <= float(low) and float(high) <= _ARRAY_FOLD_RANGE[1]
