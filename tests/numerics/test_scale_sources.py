"""Scale sources: which settings are refused, how specs read, and what scale each source gives."""

import math

import pytest
import torch

from fp8train.numerics.cast import quantize
from fp8train.numerics.scale import inverse_power_of_two, scale_from_amax
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec

DELAYED = QuantSpec(E4M3, scale_source="delayed")


@pytest.mark.parametrize("k", [-126, -3, 0, 5, 126])
def test_constant_scale(k: int) -> None:
    spec = QuantSpec(E4M3, scale_source="constant", constant_exponent=k)
    amax = torch.tensor([0.0, 1e-30, 1.0, 1e30, math.inf, math.nan])
    scale, scale_inv = scale_from_amax(amax, spec)
    assert scale.tolist() == [2.0**k] * 6
    assert scale_inv[:4].tolist() == [2.0**-k] * 4
    assert scale_inv[4:].isnan().all()
    x = torch.tensor([0.3, -2.0, 700.0]) * 2.0**-k if abs(k) < 100 else torch.tensor([2.0**-k])
    payload, scale_inv = quantize(x, spec)
    expected = [0.3125, -2.0, 448.0] if abs(k) < 100 else [1.0]
    assert payload.float().tolist() == expected
    assert float(scale_inv) == 2.0**-k


@pytest.mark.parametrize("power_of_two", [False, True])
def test_delayed_scale_replaces_the_tensors_own(power_of_two: bool) -> None:
    spec = QuantSpec(E4M3, scale_source="delayed", power_of_two=power_of_two)
    own = scale_from_amax(torch.tensor(3.0), spec)
    assert scale_from_amax(torch.tensor(3.0), spec, delayed=torch.tensor(0.0)) == own
    stored = 2.0**-9 if power_of_two else 0.3
    scale, scale_inv = scale_from_amax(torch.tensor(3.0), spec, delayed=torch.tensor(stored))
    assert float(scale) == float(torch.tensor(stored))
    assert float(scale_inv) == pytest.approx(1 / stored, rel=2**-23)
    for amax in (math.inf, math.nan):
        scale, scale_inv = scale_from_amax(torch.tensor(amax), spec, delayed=torch.tensor(stored))
        assert float(scale) == float(torch.tensor(stored))
        assert scale_inv.isnan()
    assert float(scale_from_amax(torch.tensor(0.0), spec, delayed=torch.tensor(stored))[0]) > 0


def test_inverse_of_every_power_of_two_is_exact() -> None:
    exponents = torch.arange(-126, 127)
    scale = torch.ldexp(torch.ones(253), exponents)
    assert torch.equal(inverse_power_of_two(scale), torch.ldexp(torch.ones(253), -exponents))
