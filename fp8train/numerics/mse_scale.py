"""The power-of-two scale with the least squared error.

Floating formats have the same relative error at every scale, so a power of two matters in two places only:
what exceeds the format's maximum is clipped, and what falls below its normal numbers loses bits or vanishes.
The candidates are the amax's own scale ``2^k`` (nothing is clipped) and ``2^(k+1)``: twice the range at the
small end, for which the values above ``max`` are clipped. One more step would clip the largest value to half
or less, an error of at least ``amax² / 4``, to save less than ``2^-34 · amax² / 12`` for each subnormal: it
needs more than 2^33 elements. A smaller scale than ``2^k`` gains nothing. Where both cost the same, nothing
is clipped.

The cost is a sum over a histogram of magnitudes, the 2^15 values that BF16 has: exact for BF16 sources; FP32
and FP64 ones are rounded to BF16 to choose the scale, and quantised as they are. Counts are integers, so
those of parts of a tensor add up to those of the whole, bit for bit, whatever the split or the order; costs
are then one FP64 sum in a fixed order. Source: the ``mse`` metric of Perez et al. 2023, arXiv 2309.17224,
which searches all exponents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.numerics.cast import cast, uncast
from fp8train.numerics.scale import MAX_EXPONENT, exponent_from_amax, power_of_two
from fp8train.precision.number_formats import Format
from fp8train.precision.operand_cast import QuantSpec

_INFINITY = 0x7F80  # BF16 bits; the finite magnitudes are the integers below


def magnitude_counts(x: Tensor) -> Tensor:
    """How often each BF16 magnitude occurs in ``x``: int64 [32640], by its bits; infinities and NaN are not
    counted."""
    bits = x.detach().to(torch.bfloat16).reshape(-1).view(torch.int16).to(torch.int64) & 0x7FFF
    counts = torch.zeros(0x8000, dtype=torch.int64, device=x.device)
    return counts.scatter_add_(0, bits, torch.ones_like(bits))[:_INFINITY]


def mse_scale(amax: Tensor, counts: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The scale of least squared error, and its inverse.

    Args:
        amax: FP32 scalar of the logical tensor.
        counts: its :func:`magnitude_counts`.
        spec: names the format.

    Returns:
        (scale, scale_inv), FP32 scalars; ``scale_inv`` is NaN if amax is not finite.
    """
    finite = torch.isfinite(amax)
    known = torch.where(finite, amax, torch.zeros_like(amax))
    k = exponent_from_amax(known, max_exponent=spec.format.max_exponent)
    above = (k + 1).clamp(max=MAX_EXPONENT)
    values = torch.arange(_INFINITY, dtype=torch.int16, device=amax.device).view(torch.bfloat16)
    clip = _cost(values, counts, spec.format, above) < _cost(values, counts, spec.format, k)
    k = torch.where(clip, above, k)
    return power_of_two(k), torch.where(finite, power_of_two(-k), torch.nan)


def _cost(values: Tensor, counts: Tensor, fmt: Format, k: Tensor) -> Tensor:
    """Sum of squared errors at scale ``2^k``, FP64."""
    quantised = uncast(cast(values, fmt, power_of_two(k)), power_of_two(-k), torch.float64)
    return ((values.double() - quantised).square() * counts).sum()
