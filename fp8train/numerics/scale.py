"""Scales from amax.

``scale`` multiplies before the cast, ``scale_inv`` after. For a format with largest value ``max``, the free
scale is ``max / amax``. The power-of-two scale is the largest ``2^k`` with ``amax · 2^k <= max`` (rounding
*down* never saturates), divided by ``2^margin``. Both formats have ``max = 1.75 · 2^e``, so with
``amax = f · 2^a``, ``1 <= f < 2``, the exponent is ``k = e - a``, less one where ``f > 1.75``: integer
arithmetic on the FP32 bits, the same on every device, no logarithm.

Edge cases, the same everywhere: amax 0 gives scale 1; a tiny or subnormal amax is clamped so that ``scale``
stays within ``2^±126`` and its inverse is a normal number; a NaN or infinite amax gives scale 1, and
``scale_inv`` becomes NaN, so the non-finite source makes the product non-finite as it would in BF16 (a
saturating cast hides infinities otherwise). That last rule holds for constant and delayed scales too, which
is why their casts need the amax of the tensor at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.precision.operand_cast import QuantSpec

MAX_EXPONENT = 126
_MANTISSA_MASK = 0x7FFFFF
_THREE_QUARTERS = 0x600000  # mantissa field of 1.75


def exponent_from_amax(amax: Tensor, *, max_exponent: int, margin: int = 0) -> Tensor:
    """The exponent ``k`` of the largest power-of-two scale ``2^k`` that keeps ``amax`` within the format.

    Args:
        amax: FP32, any shape, finite and >= 0.
        max_exponent: ``floor(log2(format.max))``.
        margin: powers of two to leave free, 0 to 8.

    Returns:
        int32 of the same shape, in [-126, 126]; 0 where amax is 0.
    """
    # Adding this carries into the exponent field where the mantissa is above 1.75: a - 127, plus one there.
    exponent = (amax.view(torch.int32) + (_MANTISSA_MASK - _THREE_QUARTERS)) >> 23
    k = (max_exponent - margin + 127 - exponent).clamp_(-MAX_EXPONENT, MAX_EXPONENT)
    return k.masked_fill_(amax == 0, 0)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^exponent`` as FP32, exactly. Args: int32 in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def inverse_power_of_two(scale: Tensor) -> Tensor:
    """``1 / scale`` of FP32 powers of two in [2^-126, 2^126], by negating the exponent: exact everywhere."""
    return ((2 * 127 << 23) - scale.view(torch.int32)).view(torch.float32)


def scale_from_amax(amax: Tensor, spec: QuantSpec, *, delayed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale for a tensor whose largest magnitude is ``amax``, and its inverse.

    Args:
        amax: FP32, any shape; NaN and infinity allowed.
        spec: format, power-of-two choice and margin; or a constant scale.
        delayed: FP32 scale from earlier steps, broadcastable, that replaces the tensor's own; 0 where there
            is none yet.

    Returns:
        (scale, scale_inv), FP32 of amax's shape. ``scale`` is always finite and positive; ``scale_inv`` is
        NaN where amax is not finite. A power-of-two pair is exact: ``scale · scale_inv == 1``.
    """
    amax = amax.float()
    finite = torch.isfinite(amax)
    if spec.constant_exponent is not None:
        scale = torch.full_like(amax, 2.0**spec.constant_exponent)
        scale_inv = torch.full_like(amax, 2.0**-spec.constant_exponent)
    else:
        scale, scale_inv = _own_scale(torch.where(finite, amax, torch.zeros_like(amax)), spec)
    if delayed is not None:
        inverse = inverse_power_of_two(delayed) if spec.power_of_two else delayed.reciprocal()
        known = delayed > 0
        scale, scale_inv = torch.where(known, delayed, scale), torch.where(known, inverse, scale_inv)
    return scale, torch.where(finite, scale_inv, torch.full_like(scale_inv, torch.nan))


def _own_scale(amax: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(scale, scale_inv) from a finite amax."""
    if spec.power_of_two:
        k = exponent_from_amax(amax, max_exponent=spec.format.max_exponent, margin=spec.margin)
        return power_of_two(k), power_of_two(-k)
    limit = 2.0**MAX_EXPONENT
    # Tensor by tensor: a Python number divided by a tensor is a reciprocal and a product, rounded twice.
    ratio = torch.full_like(amax, spec.format.max * 2.0**-spec.margin) / amax
    scale = torch.where(amax == 0, torch.ones_like(amax), ratio.clamp(1.0 / limit, limit))
    return scale, scale.reciprocal()
