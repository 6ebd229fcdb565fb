"""Casts between high precision and FP8, and quantisation of a whole tensor.

A cast is defined on FP32 values: FP64 rounds to FP32 first (torch does the same), BF16 and FP16 are exact. It
multiplies by ``scale``, clamps to ±max and rounds to nearest, ties to even. The clamp is ours because torch
is not uniform: on overflow E4M3 gives NaN up to torch 2.11 and saturates from 2.12 (infinity too), E5M2 goes
to infinity. NaN stays NaN. Whether the *source* was finite is told by its amax (see
:mod:`fp8train.numerics.scale`), never by the payload.

Multiplying BF16 by a power of two is exact as long as the product is a normal BF16 number; below that FP8
rounds to zero anyway. So for BF16 sources and power-of-two scales the FP32 detour is skipped: same codes,
half the time on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.numerics.formats import dtype_of, format_of
from fp8train.numerics.granularity import amaxes, expand_scales
from fp8train.numerics.scale import scale_from_amax
from fp8train.precision.number_formats import Format
from fp8train.precision.operand_cast import QuantSpec


def amax_of(x: Tensor) -> Tensor:
    """Largest magnitude of ``x`` as an FP32 scalar; NaN if any element is NaN, 0 for an empty tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = torch.aminmax(x)  # one pass over memory; abs().amax() makes two
        return torch.maximum(-low, high).float().abs()  # abs: the maximum of -0 and 0 may be -0
    return x.abs().amax().float()


def cast(x: Tensor, fmt: Format, scale: Tensor, *, scale_is_power_of_two: bool = False) -> Tensor:
    """Cast to FP8, saturating: ``round(clamp(x · scale))`` in ``fmt``, to nearest even.

    Args:
        x: floating tensor of any shape.
        fmt: target format.
        scale: FP32 scalar or broadcastable.
        scale_is_power_of_two: lets BF16 sources skip the FP32 detour; the codes are the same.

    Returns:
        Payload of x's shape in ``fmt.dtype``.
    """
    if x.dtype == torch.bfloat16 and scale_is_power_of_two:
        scaled = x * scale.to(torch.bfloat16)
    else:
        scaled = x.float() * scale
    return scaled.clamp_(-fmt.max, fmt.max).to(dtype_of(fmt))


def uncast(payload: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``payload · scale_inv`` in ``dtype``, every one of the 256 codes right (NaN and infinity included).

    The product is taken in FP32 (FP64 for ``dtype=float64``) and then converted to ``dtype``; with a
    power-of-two scale that rounds at most once.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (payload.to(work) * scale_inv.to(work)).to(dtype)


def operand_amax(x: Tensor, spec: QuantSpec, contracted: int) -> Tensor:
    """The amax of what shares a scale: FP32, a scalar or as :mod:`fp8train.numerics.granularity` says.

    Args:
        x: floating tensor; a matrix unless the granularity is ``tensor``.
        spec: names the granularity.
        contracted: dimension of x that the GEMM contracts.
    """
    return amax_of(x) if spec.granularity == "tensor" else amaxes(x, spec.granularity, contracted)


def quantize(x: Tensor, spec: QuantSpec, *, contracted: int = 1) -> tuple[Tensor, Tensor]:
    """Quantise with scales from x's own amaxes (``current`` and ``constant`` scales).

    Args:
        x: floating tensor; a matrix unless the granularity is ``tensor``.
        spec: what to do.
        contracted: dimension of x that the GEMM contracts; without meaning for one scale per tensor.

    Returns:
        (payload in ``spec.format.dtype``, FP32 scale_inv of amax's shape); ``scale_inv`` is NaN where x is
        not finite.
    """
    assert not spec.is_nvfp4, "fp8train.numerics.nvfp4 simulates that"
    scale, scale_inv = scale_from_amax(operand_amax(x, spec, contracted), spec)
    payload = cast(x, spec.format, expand_scales(scale, x.shape), scale_is_power_of_two=spec.power_of_two)
    return payload, scale_inv


def decode_finite(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 to BF16, FP32 or FP64 for payloads that hold no NaN or infinity: the GEMM operands of a CPU.

    Both formats are a BF16 or FP32 with fewer bits: shifting the code into place and multiplying by
    ``2^(127 - bias)`` decodes it, subnormals included, in a quarter of the time of ``Tensor.to``. Special
    codes come out as large finite values; a quantised operand only holds them when its ``scale_inv`` is NaN,
    which makes the product NaN all the same. The shifted codes of FP8 subnormals are subnormals too, so this
    needs gradual underflow, torch's default (``torch.set_flush_denormal(False)``).
    """
    if dtype == torch.float64 or payload.device.type != "cpu" or torch.compiler.is_compiling():
        return payload.to(dtype)
    fmt = format_of(payload.dtype)
    integer, mantissa_bits = (torch.int16, 7) if dtype == torch.bfloat16 else (torch.int32, 23)
    shift = mantissa_bits - fmt.mantissa_bits
    keep_sign_and_code = (0x7F << shift) + torch.iinfo(integer).min
    code = payload.view(torch.int8).to(integer).bitwise_left_shift_(shift).bitwise_and_(keep_sign_and_code)
    return code.view(dtype).mul_(2.0 ** (127 - fmt.bias))
