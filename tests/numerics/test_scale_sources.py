"""Scale sources: which settings are refused, how specs read, and what scale each source gives."""

import math
from typing import Any

import pytest
import torch

from fp8train.numerics.cast import quantize
from fp8train.numerics.formats import E4M3, E5M2
from fp8train.numerics.quant_spec import LinearQuant, QuantSpec
from fp8train.numerics.scale import inverse_power_of_two, scale_from_amax

DELAYED = QuantSpec(E4M3, scale_source="delayed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_source": "running"}, r"scale_source: 'running'; legal: current, delayed, constant"),
        ({"scale_source": "delayed", "history": 0}, r"history: 0 steps; legal: 1 to 1024"),
        ({"scale_source": "delayed", "history": 1025}, r"history: 1025 steps"),
        ({"scale_source": "delayed", "interval": 0}, r"interval: 0 steps; legal: 1 or more"),
        ({"scale_source": "delayed", "reduce": "mean"}, r"reduce: 'mean'; legal: max, most_recent"),
        ({"scale_source": "delayed", "margin": 9}, r"margin: 9 powers of two"),
        ({"history": 4}, r"history: 4 has no effect with scale_source: current; leave it at 16"),
        ({"reduce": "most_recent"}, r"reduce: most_recent has no effect with scale_source: current"),
        (
            {"scale_source": "constant", "constant_exponent": 1, "interval": 2},
            r"interval: 2 has no effect with scale_source: constant",
        ),
        ({"constant_exponent": 3}, r"constant_exponent: 3 has no effect with scale_source: current"),
        (
            {"scale_source": "delayed", "constant_exponent": 0},
            r"constant_exponent: 0 has no effect with scale_source: delayed",
        ),
        ({"scale_source": "constant"}, r"scale_source: constant needs constant_exponent"),
        (
            {"scale_source": "constant", "constant_exponent": 127},
            r"constant_exponent: 127; legal: -126 to 126",
        ),
        (
            {"scale_source": "constant", "constant_exponent": 2, "power_of_two": False},
            r"power_of_two: false has no effect",
        ),
        (
            {"scale_source": "constant", "constant_exponent": 2, "margin": 1},
            r"margin: 1 has no effect .* lower constant_exponent",
        ),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(E4M3, **settings)


def test_str() -> None:
    assert str(DELAYED) == "e4m3:delayed16max/tensor/pow2"
    spec = QuantSpec(
        E5M2,
        scale_source="delayed",
        history=4,
        reduce="most_recent",
        interval=8,
        margin=1,
        power_of_two=False,
    )
    assert str(spec) == "e5m2:delayed4recent@8/tensor/fp32-1"
    constant = QuantSpec(E4M3, scale_source="constant", constant_exponent=-3)
    assert str(constant) == "e4m3:constant2^-3/tensor/pow2"
    assert "x=e4m3:delayed16max/tensor/pow2" in str(LinearQuant(output_x=DELAYED, grad_weight_x=DELAYED))


def test_same_payload_means_one_cast() -> None:
    """Uses that share a payload share a cast, and so a slot; ``same`` compares the history too."""
    everything = LinearQuant(
        output_x=DELAYED,
        keep_x="second_copy",
        keep_w="bf16",
        grad_weight_grad_output=QuantSpec(E5M2, margin=1),
    )
    uses = ["output.x", "output.w", "grad_input.grad_output"]
    assert list(LinearQuant().casts()) == uses
    assert list(everything.casts()) == [*uses, "grad_weight.x", "grad_input.w", "grad_weight.grad_output"]
    assert everything.casts()["output.x"] is DELAYED
    with pytest.raises(ValueError, match=r"delayed16max.*asks for e4m3:delayed8max"):
        LinearQuant(output_x=DELAYED, grad_weight_x=QuantSpec(E4M3, scale_source="delayed", history=8))


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
