"""The scale rule against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8train.numerics.scale import exponent_from_amax, power_of_two, scale_from_amax
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec

FORMATS = [E4M3, E5M2]
LIMIT = Fraction(2) ** 126


def exact_exponent(amax: float, fmt: Format, margin: int) -> int:
    """Largest k with amax · 2^k <= max, less the margin, clamped to ±126; 0 for 0."""
    if amax == 0:
        return 0
    ratio = Fraction(fmt.max) / Fraction(amax)
    k = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    while Fraction(2) ** k > ratio:
        k -= 1
    while Fraction(2) ** (k + 1) <= ratio:
        k += 1
    return max(-126, min(126, k - margin))


def adversarial() -> Tensor:
    """Every FP32 exponent, subnormals too, with mantissas 1, just above, around 1.75 and just below 2."""
    mantissas = [0, 1, 0x400000, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFE, 0x7FFFFF]
    bits = [(exponent << 23) | mantissa for exponent in range(255) for mantissa in mantissas]
    bits += [1 << shift for shift in range(23)] + [(7 << shift) + 1 for shift in range(20)]
    generator = torch.Generator().manual_seed(3)
    random = torch.randint(0, 0x7F800000, (2000,), generator=generator, dtype=torch.int64).tolist()
    return torch.tensor(bits + random, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("margin", [0, 1, 3, 8])
def test_power_of_two_exponent_is_exact(fmt: Format, margin: int) -> None:
    amax = adversarial()
    got = exponent_from_amax(amax, max_exponent=fmt.max_exponent, margin=margin)
    assert got.dtype == torch.int32
    assert got.tolist() == [exact_exponent(value, fmt, margin) for value in amax.tolist()]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("margin", [0, 2])
def test_never_saturates_and_is_the_largest(fmt: Format, margin: int) -> None:
    amax = adversarial()
    amax = amax[amax > 0]
    scale, scale_inv = scale_from_amax(amax, QuantSpec(fmt, margin=margin))
    top = Fraction(fmt.max) / 2**margin
    for value, s, inverse in zip(amax.tolist(), scale.tolist(), scale_inv.tolist(), strict=True):
        assert Fraction(s) * Fraction(inverse) == 1
        scaled = Fraction(value) * Fraction(s)
        assert scaled <= top or Fraction(s) == 1 / LIMIT  # the clamp at the far end; see the next test
        assert 2 * scaled > top or Fraction(s) == LIMIT


def test_clamped_scales_still_do_not_saturate() -> None:
    """The clamp at 2^-126 is reached by a margin only, which leaves more room than it takes."""
    amax = torch.tensor(torch.finfo(torch.float32).max)
    for fmt in FORMATS:
        for margin in range(9):
            scale, _ = scale_from_amax(amax, QuantSpec(fmt, margin=margin))
            assert Fraction(float(amax)) * Fraction(float(scale)) <= Fraction(fmt.max)


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**k for k in range(-126, 128)]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("pow2", [True, False])
def test_edge_values(fmt: Format, pow2: bool) -> None:
    spec = QuantSpec(fmt, power_of_two=pow2)
    amax = torch.tensor([0.0, -0.0, math.nan, math.inf, 1e-45, 1e-38, 3e38])
    scale, scale_inv = scale_from_amax(amax, spec)
    assert scale.shape == scale_inv.shape == amax.shape
    assert scale.dtype == scale_inv.dtype == torch.float32
    assert scale[:4].tolist() == [1.0] * 4
    assert scale_inv[:2].tolist() == [1.0, 1.0]
    assert scale_inv[2:4].isnan().all()
    assert scale[4:6].tolist() == [2.0**126] * 2
    assert scale_inv[4:6].tolist() == [2.0**-126] * 2  # a normal number
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    scalar, _ = scale_from_amax(torch.tensor(2.0), spec)
    assert scalar.shape == ()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("margin", [0, 1, 8])
def test_free_scale_is_the_rounded_quotient(fmt: Format, margin: int) -> None:
    amax = adversarial()
    amax = amax[(amax > 1e-30) & (amax < 1e30)]
    scale, scale_inv = scale_from_amax(amax, QuantSpec(fmt, power_of_two=False, margin=margin))
    expected = np.float32(fmt.max * 2.0**-margin) / amax.numpy()  # IEEE division
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(scale_inv.numpy(), np.float32(1) / expected)
    assert np.max(np.abs(scale.double().numpy() * scale_inv.double().numpy() - 1)) <= 2.0**-23


@pytest.mark.parametrize("margin", [-1, 9])
def test_margin_is_bounded(margin: int) -> None:
    with pytest.raises(ValueError, match=f"margin: {margin} powers of two; legal: 0 to 8"):
        QuantSpec(E4M3, margin=margin)


def test_spec_reads_as_one_word() -> None:
    assert str(QuantSpec(E4M3)) == "e4m3:cur/tensor/pow2"
    assert str(QuantSpec(E5M2, power_of_two=False, margin=2)) == "e5m2:cur/tensor/fp32-2"
