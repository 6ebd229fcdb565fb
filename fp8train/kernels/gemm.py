"""FP8 matrix multiplication: one operation, an implementation per device.

``output = alpha · scale_inv_a · scale_inv_b · (a @ b)`` with FP8 payloads, accumulated in at least FP32 and
rounded once.

* ``scaled_mm``: the tensor cores of a Hopper-class GPU through torch's public scaled matmul. They take A
  row-major and B column-major only, so backward GEMMs need transposed copies, made here in one place.
* ``decode``: any device without FP8 units. Every FP8 value is exact in BF16, so for a BF16 result and
  power-of-two scales a BF16 matmul of the decoded payloads *is* the FP8 GEMM (accumulation order apart). FP32
  and FP64 results multiply in FP32 and FP64, and so do BF16 results on a CPU that has no BF16 instructions.

Scales may belong to rows or blocks (:mod:`fp8train.numerics.granularity`). ``decode`` multiplies each operand
by its scales before the product, which is exact for powers of two: in BF16 too, where they are in range.
``scaled_mm`` uses the kernel that torch has for these scales, this result type and these shapes
(:mod:`fp8train.kernels.scaling`); where there is none, the operands are decoded on the device, and
:mod:`fp8train.kernels.gemm_choice` says for which. None of the kernels for rows and blocks has been run on a
GPU yet.

* ``te``: Transformer Engine's GEMM on the same operands (:mod:`fp8train.kernels.te.gemm`), if asked for; what
  it does not multiply goes to ``scaled_mm``.
* ``te_native``: nothing multiplies here; linears are Transformer Engine's own
  (:mod:`fp8train.kernels.te.native`).
* ``simulation``: NVFP4 (:mod:`fp8train.numerics.nvfp4`), whose payloads are values in the compute type
  already: multiplied in FP32, and rounded once.
* ``fast13`` and the like, for checks alone: :func:`emulation`.

The first two refuse what the GPU refuses (rules below), so that what runs on a laptop runs there: FP8 dtypes,
E5M2 x E5M2, K and N not multiples of 16. A machine that cannot do FP8 in hardware says so in the reason of
its choice; nothing falls back to BF16 operands.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.decode import decode_gemm
from fp8train.kernels.fast_accumulation import FRACTION_BITS, accumulate
from fp8train.kernels.gemm_choice import GemmBackend
from fp8train.kernels.padding import ALIGNMENT
from fp8train.kernels.scaling import (
    cuda_version,
    fits_kernel,
    granularity_of,
    native_pair,
    scaled_mm_of_arrays,
)
from fp8train.kernels.te import gemm as te_gemm


def emulation(bits: int = FRACTION_BITS, *, fast: bool = True) -> GemmBackend:
    """``decode``, but GEMMs with ``fast_accumulation`` add in a model of a tensor core's accumulator.

    Args:
        bits: of its fraction, 1 to 17.
        fast: keep it over all of K; ``False``: as without fast accumulation.
    """
    kind = "fast" if fast else "promoted"
    return GemmBackend(f"{kind}{bits}", f"emulation of {kind} accumulation in {bits} bits of fraction")


def check_operands(a: Tensor, b: Tensor) -> None:
    """Refuse what no FP8 tensor core multiplies: a [M, K], b [K, N]; ``ValueError`` names the rule."""
    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    if a.dtype not in fp8 or b.dtype not in fp8:
        raise ValueError(
            f"FP8 GEMM of {a.dtype} and {b.dtype}: both operands must be float8_e4m3fn or float8_e5m2"
        )
    if a.dtype == b.dtype == torch.float8_e5m2:
        raise ValueError("FP8 GEMM of E5M2 by E5M2 does not exist in hardware; make one operand E4M3")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"FP8 GEMM of shapes {tuple(a.shape)} and {tuple(b.shape)}: expected [M, K] and [K, N]"
        )
    if a.shape[1] % ALIGNMENT or b.shape[1] % ALIGNMENT:
        raise ValueError(
            f"FP8 GEMM with K={a.shape[1]}, N={b.shape[1]}: "
            f"both must be multiples of {ALIGNMENT}; pad with zeros"
        )


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast_accumulation: bool = False,
) -> Tensor:
    """torch's scaled matmul under the GPU's own rules, on every device.

    Args:
        a: FP8 [M, K], row-major.
        b: FP8 [K, N], column-major.
        scale_inv_a: FP32 scalar, or [M, 1] for one scale per row, or of blocks.
        scale_inv_b: FP32 scalar, or [1, N], or of blocks.
        out_dtype: BF16, FP16 or FP32.
        fast_accumulation: Hopper's 14-bit accumulator.

    Returns:
        [M, N] in ``out_dtype``.

    Raises:
        ValueError: an operand breaks a rule; the message names it.
    """
    check_operands(a, b)
    if not a.is_contiguous():
        raise ValueError(f"FP8 GEMM: A must be row-major, its strides are {a.stride()}")
    if not b.t().is_contiguous():
        raise ValueError(f"FP8 GEMM: B must be column-major, its strides are {b.stride()}")
    if scale_inv_a.dim() or scale_inv_b.dim():
        return scaled_mm_of_arrays(
            a, b, scale_inv_a, scale_inv_b, out_dtype=out_dtype, fast_accumulation=fast_accumulation
        )
    if hasattr(F, "scaled_mm"):
        recipe = F.ScalingType.TensorWise
        return F.scaled_mm(
            a,
            b,
            scale_inv_a,
            recipe,
            scale_inv_b,
            recipe,
            output_dtype=out_dtype,
            use_fast_accum=fast_accumulation,
        )
    return torch._scaled_mm(
        a, b, scale_inv_a, scale_inv_b, out_dtype=out_dtype, use_fast_accum=fast_accumulation
    )


def _has_kernel(
    a: Tensor, b: Tensor, scale_inv_a: Tensor, scale_inv_b: Tensor, out_dtype: torch.dtype
) -> bool:
    """Whether ``scaled_mm`` multiplies operands with these scales on their device."""
    if not (scale_inv_a.dim() or scale_inv_b.dim()):
        return True
    kinds = granularity_of(scale_inv_a, a.shape, 1), granularity_of(scale_inv_b, b.shape, 0)
    if a.device.type == "cpu":  # torch's for a CPU knows rows
        return set(kinds) <= {"tensor", "row"}
    capability = torch.cuda.get_device_capability(a.device)
    known = native_pair(*kinds, capability, cuda_version(), out_dtype, b.dtype)
    return known and fits_kernel(*kinds, a.shape[0], a.shape[1], b.shape[1])


def _te_multiplies(a: Tensor, b: Tensor, kinds: te_gemm.Kinds, pow2: bool, out_dtype: torch.dtype) -> bool:
    """Whether Transformer Engine multiplies these operands on their device; one scale each: it does where it
    was chosen."""
    if kinds == ("tensor", "tensor"):
        return True
    capability = torch.cuda.get_device_capability(a.device)
    known = te_gemm.multiplies(kinds, capability, cuda_version(), out_dtype, power_of_two=pow2)
    return known and te_gemm.fits(kinds, a.shape[0], a.shape[1], b.shape[1])


def _fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    alpha: float,
    pow2: bool,
    out_dtype: torch.dtype,
    backend: str,
    fast_accumulation: bool,
) -> Tensor:
    if fast_accumulation and (emulated := re.fullmatch(r"(fast|promoted)(\d+)", backend)):
        product = accumulate(a, b, bits=int(emulated[2]), fast=emulated[1] == "fast")
        return (product * (alpha * scale_inv_a * scale_inv_b)).to(out_dtype)
    if backend == "simulation":
        return decode_gemm(a, b, scale_inv_a, scale_inv_b, alpha, False, out_dtype)
    if backend == "decode" and a.element_size() == 1 < b.element_size():
        # a weight that was decoded once, for many products
        return decode_gemm(a, b, scale_inv_a, scale_inv_b, alpha, pow2, out_dtype)
    check_operands(a, b)
    if backend == "te":
        kinds = granularity_of(scale_inv_a, a.shape, 1), granularity_of(scale_inv_b, b.shape, 0)
        if _te_multiplies(a, b, kinds, pow2, out_dtype):
            return te_gemm.multiply(
                *(a, b, scale_inv_a, scale_inv_b, kinds),
                alpha=alpha,
                out_dtype=out_dtype,
                fast_accumulation=fast_accumulation,
            )
    gpu = backend in ("scaled_mm", "te")
    if not gpu or not _has_kernel(a, b, scale_inv_a, scale_inv_b, out_dtype):
        return decode_gemm(a, b, scale_inv_a, scale_inv_b, alpha, pow2, out_dtype)
    column_major_b = b.t().contiguous().t()
    outside = alpha != 1.0 and granularity_of(scale_inv_a, a.shape, 1) == "mx_1x32"  # E8M0 holds no alpha
    product = scaled_mm(
        a.contiguous(),
        column_major_b,
        scale_inv_a if outside or alpha == 1.0 else scale_inv_a * alpha,
        scale_inv_b,
        out_dtype=out_dtype,
        fast_accumulation=fast_accumulation,
    )
    return product * alpha if outside else product


_fp8_gemm_op = torch.library.custom_op("fp8train::gemm", _fp8_gemm, mutates_args=())


@_fp8_gemm_op.register_fake
def _(a: Tensor, b: Tensor, *others: Any) -> Tensor:
    out_dtype = others[4]
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    *,
    alpha: float = 1.0,
    power_of_two: bool,
    out_dtype: torch.dtype,
    backend: str,
    fast_accumulation: bool = False,
) -> Tensor:
    """Multiply two FP8 operands: ``alpha · (a · scale_inv_a) @ (b · scale_inv_b)``.

    Args:
        a: FP8 payload [M, K], any strides; BF16, FP32 or FP64 for ``simulation``.
        b: payload [K, N], likewise.
        scale_inv_a: FP32 scalar, or of rows or blocks of ``a``; NaN makes what it scales NaN.
        scale_inv_b: likewise of ``b``.
        alpha: the GEMM's own multiplier.
        power_of_two: all scales are powers of two (a faster exact path exists).
        out_dtype: BF16, FP32 or FP64.
        backend: name from :func:`~fp8train.kernels.gemm_choice.choose_gemm_backend`.
        fast_accumulation: only for ``scaled_mm`` and ``te``.

    Returns:
        [M, N] in ``out_dtype``.

    Raises:
        ValueError: the operands break a rule of :func:`check_operands`.
    """
    # Under torch.compile the operation is opaque: the same code runs and gives the same bits as eagerly.
    call = _fp8_gemm_op if torch.compiler.is_compiling() else _fp8_gemm
    return call(a, b, scale_inv_a, scale_inv_b, alpha, power_of_two, out_dtype, backend, fast_accumulation)
