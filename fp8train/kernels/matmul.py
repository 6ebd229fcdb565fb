"""High-precision products on CPUs that cannot multiply BF16.

Every BF16 product is exact in FP32, so widening both operands, multiplying in FP32 and rounding the sum once
is what a BF16 matmul means. torch does that itself where the CPU has BF16 instructions (AMX, AVX512-BF16);
elsewhere its BF16 kernels are scalar loops: 7 against 75 GFLOP/s for [1024, 192] x [192, 1024] on one Zen 3
core (torch 2.13).
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits that oneDNN, torch's library of CPU matrix products, reads from ``ONEDNN_MAX_CPU_ISA``; torch's own
answer is about the machine alone."""


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return limit not in _WITHOUT_BF16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_multiplies_bf16() -> bool:
    """Whether this machine's CPU has BF16 multiplication, asked once."""
    return _cpu_multiplies_bf16()


# What torch.compiler.assume_constant_result does, without importing the compiler: that takes a second.
cpu_multiplies_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def widens(x: Tensor) -> bool:
    """Whether products of ``x`` are formed in FP32, and rounded."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bf16()


def matmul(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``alpha · a @ b``, accumulated in at least FP32 and rounded once. Shapes: [.., M, K], [K, N] of one
    dtype; two-dimensional with an ``alpha`` other than 1."""
    if widens(a):
        product = a.float() @ b.float()
        return (product if alpha == 1.0 else product.mul_(alpha)).to(a.dtype)
    if alpha == 1.0:
        return a @ b
    return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=alpha)  # beta 0: what is added is not read
