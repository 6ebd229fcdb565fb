"""A model of the accumulators of FP8 tensor cores, for CPUs: what sums lose, not how fast they are.

Hopper adds FP8 products in registers that hold fewer bits than FP32. The model, for each step of 32 elements
of K and each output::

    e      = exponent of the largest magnitude among the 32 products and the accumulator
    unit   = 2^(e - bits)
    sum    = Σ truncate(product / unit) + truncate(accumulator / unit)        integers, exact
    acc    = sum · unit, truncated to ``bits`` bits of fraction

Products are exact and truncation is towards zero. ``bits = 13`` is what PyTorch's notes on checking Hopper's
FP8 GEMMs call e8m13, and the "14 bits" of DeepSeek-V3 (arXiv 2412.19437, sections 3.3.2 and 3.5.2: the
highest 14 bits of each of 32 aligned products). *Without* fast accumulation the registers are the same, but
every 128 elements of K they are added to an FP32 number and begin at zero (section 3.3.2, figure 7b).

It is a model: the exponent that a product gets and the order within a step are not published, and it was not
held against hardware. It is no setting: checks give it to linears as their GEMM
(:func:`~fp8train.kernels.gemm.emulation`). It takes a few passes over all M · N · K products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.numerics.cast import decode_finite

FRACTION_BITS = 13
STEP = 32
"""Elements of K that one instruction adds."""
PROMOTED = 128
"""Elements of K after which the sum goes to FP32, without fast accumulation."""
_CHUNK = 1 << 18  # products at once: what a core's cache holds
_TINY = 2.0**-60  # below every product of FP8 codes: zeros alone have no exponent of their own
_FP32_FRACTION, _BIAS = 23, 127


def accumulate(a: Tensor, b: Tensor, *, bits: int = FRACTION_BITS, fast: bool = True) -> Tensor:
    """``a @ b`` as the model adds it.

    Args:
        a: FP8 codes, or FP32 values that are such, [M, K], finite.
        b: likewise, [K, N].
        bits: of the accumulator's fraction.
        fast: keep the accumulator over all of K.

    Returns:
        FP32 [M, N].
    """
    a, b = (decode_finite(x, torch.float32) if x.element_size() == 1 else x.float() for x in (a, b))
    a, b = _in_steps(a.t()), _in_steps(b)
    out = a.new_empty(a.shape[2], b.shape[2])
    rows = max(1, _CHUNK // (STEP * max(1, b.shape[2])))
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        out[part] = _rows(a[:, :, part], b, bits, fast=fast)
    return out


def _in_steps(x: Tensor) -> Tensor:
    """[K, columns] as [steps, 32, columns], filled up with zeros."""
    missing = -len(x) % STEP
    return torch.nn.functional.pad(x, (0, 0, 0, missing)).reshape(-1, STEP, x.shape[1])


def _rows(a: Tensor, b: Tensor, bits: int, *, fast: bool) -> Tensor:
    total = accumulator = a.new_zeros(a.shape[2], b.shape[2])
    for step, (left, right) in enumerate(zip(a, b, strict=True)):
        if not fast and step and step % (PROMOTED // STEP) == 0:
            total, accumulator = total + accumulator, torch.zeros_like(accumulator)
        accumulator = _add(accumulator, left.unsqueeze(2) * right.unsqueeze(1), bits)
    return accumulator if fast else total + accumulator


def _add(accumulator: Tensor, products: Tensor, bits: int) -> Tensor:
    """One instruction: [M, N] and its products [32, M, N], which are overwritten."""
    largest = torch.maximum(products.amax(0), products.amin(0).neg_())
    largest = largest.maximum(accumulator.abs()).clamp_(min=_TINY)
    exponent = largest.view(torch.int32) >> _FP32_FRACTION  # of positive numbers: with its bias
    unit = ((exponent - bits) << _FP32_FRACTION).view(torch.float32)
    per_unit = ((2 * _BIAS - exponent + bits) << _FP32_FRACTION).view(torch.float32)
    # At most 33 · 2^(bits + 1), so FP32 holds the sum of up to 17 bits exactly, in any order.
    total = products.mul_(per_unit).trunc_().sum(0).add_((accumulator * per_unit).trunc_()).mul_(unit)
    kept = -(1 << (_FP32_FRACTION - bits))
    return (total.view(torch.int32) & kept).view(torch.float32)
