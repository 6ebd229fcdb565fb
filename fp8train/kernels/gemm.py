"""FP8 matrix multiplication: one operation, an implementation per device.

``output = alpha · scale_inv_a · scale_inv_b · (a @ b)`` with FP8 payloads, accumulated in at least FP32 and
rounded once.

* ``scaled_mm``: the tensor cores of a Hopper-class GPU through torch's public scaled matmul. They take A
  row-major and B column-major only, so backward GEMMs need transposed copies, made here in one place.
* ``decode``: any device without FP8 units. Every FP8 value is exact in BF16, so for a BF16 result and
  power-of-two scales a BF16 matmul of the decoded payloads *is* the FP8 GEMM (accumulation order apart). FP32
  and FP64 results multiply in FP32 and FP64, and so do BF16 results on a CPU that has no BF16 instructions.

Both refuse what the GPU refuses (rules below), so that what runs on a laptop runs on a cluster: FP8 dtypes,
E5M2 x E5M2, K and N not multiples of 16. A machine that cannot do FP8 in hardware says so in
:attr:`GemmBackend.reason`; nothing falls back to BF16 operands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.matmul import cpu_multiplies_bf16
from fp8train.numerics.cast import decode_finite

ALIGNMENT = 16
_FOLD_RANGE = (2.0**-90, 2.0**6)


@dataclass(frozen=True)
class GemmBackend:
    """Which implementation runs, and why."""

    name: Literal["scaled_mm", "decode"]
    reason: str


def choose_gemm_backend(device: torch.device, compute_dtype: torch.dtype) -> GemmBackend:
    """The implementation for ``device``, chosen once when a model is built.

    Raises:
        ValueError: a CUDA device without FP8 tensor cores (compute capability below 8.9) was asked for BF16
            FP8 training.
    """
    if device.type == "cpu":
        return GemmBackend("decode", "CPU: FP8 operands decoded, multiplied in the compute dtype")
    if compute_dtype == torch.float64:
        return GemmBackend(
            "decode", "FP64 results exist only for checking: FP8 operands decoded, multiplied in FP64"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            "precision.gemm.fp8 needs compute capability 8.9 or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; "
            "set precision.gemm.fp8=false or run with run.device=cpu"
        )
    return GemmBackend("scaled_mm", f"FP8 tensor cores, compute capability {capability[0]}.{capability[1]}")


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
        scale_inv_a: FP32 scalar.
        scale_inv_b: FP32 scalar.
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


def _decode_gemm(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    alpha: float,
    pow2: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The ``decode`` implementation; arguments as :func:`fp8_gemm`."""
    on_cpu = a.device.type == "cpu"
    in_bf16 = out_dtype == torch.bfloat16 and pow2 and alpha == 1.0
    in_bf16 = in_bf16 and not (on_cpu and not cpu_multiplies_bf16())
    work = torch.bfloat16 if in_bf16 else torch.float64 if out_dtype == torch.float64 else torch.float32
    a, b = decode_finite(a, work), decode_finite(b, work)
    if not on_cpu:  # the scales stay on the device: no host sync
        return ((a @ b) * (alpha * scale_inv_a.double() * scale_inv_b.double())).to(out_dtype)
    factor = alpha * float(scale_inv_a) * float(scale_inv_b)
    if in_bf16 and _FOLD_RANGE[0] <= factor <= _FOLD_RANGE[1]:
        # Exact on the smaller operand; outside the range it could leave BF16's normal numbers.
        (a if a.numel() <= b.numel() else b).mul_(factor)
        return a @ b
    return _times(a @ b, factor).to(out_dtype)


def _times(product: Tensor, factor: float) -> Tensor:
    """``product · factor`` in place, for factors outside FP32's range too (there 0 · factor must stay 0)."""
    if product.dtype != torch.float64 and math.isfinite(factor):
        if abs(factor) > 2.0**127:
            return product.mul_(2.0**127).mul_(factor * 2.0**-127)
        if abs(factor) < 2.0**-126:
            return product.mul_(2.0**-126).mul_(factor * 2.0**126)
    return product.mul_(factor)


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
    check_operands(a, b)
    if backend == "decode":
        return _decode_gemm(a, b, scale_inv_a, scale_inv_b, alpha, pow2, out_dtype)
    column_major_b = b.t().contiguous().t()
    scale = scale_inv_a if alpha == 1.0 else scale_inv_a * alpha
    return scaled_mm(
        a.contiguous(),
        column_major_b,
        scale,
        scale_inv_b,
        out_dtype=out_dtype,
        fast_accumulation=fast_accumulation,
    )


@torch.library.custom_op("fp8train::gemm", mutates_args=())
def _fp8_gemm_op(
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
    return _fp8_gemm(a, b, scale_inv_a, scale_inv_b, alpha, pow2, out_dtype, backend, fast_accumulation)


@_fp8_gemm_op.register_fake
def _(
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
    """Multiply two FP8 operands.

    Args:
        a: FP8 payload [M, K], any strides.
        b: FP8 payload [K, N], any strides.
        scale_inv_a: FP32 scalar; NaN makes the result NaN.
        scale_inv_b: FP32 scalar.
        alpha: the GEMM's own multiplier.
        power_of_two: both scales are powers of two (a faster exact path exists).
        out_dtype: BF16, FP32 or FP64.
        backend: name from :func:`choose_gemm_backend`.
        fast_accumulation: only for ``scaled_mm``.

    Returns:
        [M, N] in ``out_dtype``.

    Raises:
        ValueError: the operands break a rule of :func:`check_operands`.
    """
    # Under torch.compile the operation is opaque: the same code runs and gives the same bits as eagerly.
    call = _fp8_gemm_op if torch.compiler.is_compiling() else _fp8_gemm
    return call(a, b, scale_inv_a, scale_inv_b, alpha, power_of_two, out_dtype, backend, fast_accumulation)
