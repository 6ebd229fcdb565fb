"""One operand's cast: which settings are refused, under which keys, and how it reads."""

from typing import Any

import pytest

from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E2M1, E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.problems import PrecisionError

DELAYED = QuantSpec(E4M3, scale_source="delayed")
CONSTANT = {"scale_source": "constant", "constant_exponent": 2}
SQUARES = {"granularity": "nv_16x16", "power_of_two": False}


@pytest.mark.parametrize(
    ("fmt", "settings", "keys", "message"),
    [
        (E4M3, {"scale_source": "running"}, "scale_source", "'running'; legal: current, delayed, constant"),
        (E4M3, {"scale_source": "delayed", "history": 0}, "history", "history: 0 steps; legal: 1 to 1024"),
        (E4M3, {"scale_source": "delayed", "history": 1025}, "history", "history: 1025 steps"),
        (E4M3, {"scale_source": "delayed", "interval": 0}, "interval", "0 steps; legal: 1 or more"),
        (E4M3, {"scale_source": "delayed", "reduce": "mean"}, "reduce", "'mean'; legal: max, most_recent"),
        (E4M3, {"scale_source": "delayed", "margin": 9}, "margin", "margin: 9 powers of two; legal: 0 to 8"),
        (E4M3, {"history": 4}, "history scale_source", "history: 4 is read with scale_source: delayed, but"),
        (E4M3, {"reduce": "most_recent"}, "reduce scale_source", "scale_source is current"),
        (E4M3, {**CONSTANT, "interval": 2}, "interval scale_source", "scale_source is constant"),
        (
            E4M3,
            {"constant_exponent": 0},
            "constant_exponent scale_source",
            "0 is read with scale_source: cons",
        ),
        (E4M3, {"scale_source": "constant"}, "constant_exponent scale_source", "needs constant_exponent"),
        (E4M3, {**CONSTANT, "constant_exponent": 127}, "constant_exponent", "127 .*legal: -126 to 126"),
        (
            E4M3,
            {**CONSTANT, "power_of_two": False},
            "power_of_two scale_source",
            "power_of_two: false is read with scale_source: current or delayed",
        ),
        (
            E4M3,
            {**CONSTANT, "margin": 1},
            "margin scale_source",
            "margin: 1 is read with scale_source: current",
        ),
        (
            E4M3,
            {"scale_source": "mse", "margin": 1},
            "margin scale_source",
            "margin: 1 is read with scale_source: current",
        ),
        (E4M3, {"granularity": "column"}, "granularity", "'column'; legal: tensor, row, block_1x128"),
        (
            E4M3,
            {"granularity": "row", "scale_source": "delayed"},
            "granularity scale_source",
            "takes each scale from its own amax, but scale_source is delayed; write scale_source: current",
        ),
        (
            E4M3,
            {"granularity": "mx_1x32", "power_of_two": False},
            "power_of_two granularity",
            "mx_1x32 has powers of two",
        ),
        (E2M1, {"power_of_two": False}, "granularity format", "tensor with format: e2m1; e2m1 has nv_1x16"),
        (E4M3, SQUARES, "granularity format", "nv_16x16 with format: e4m3; e2m1 has nv_1x16 or nv_16x16"),
        (
            E4M3,
            {"rounding": "stochastic"},
            "rounding format",
            "stochastic is read with format: e2m1, but format is e4m3; remove it",
        ),
        (E5M2, {"hadamard": True}, "hadamard format", "hadamard: true is read with format: e2m1"),
        (E2M1, {"granularity": "nv_1x16"}, "power_of_two format", "write power_of_two: false"),
        (E2M1, {**SQUARES, "rounding": "stochastic"}, "rounding granularity", "belong to nv_1x16"),
    ],
)
def test_refused(fmt: Format, settings: dict[str, Any], keys: str, message: str) -> None:
    with pytest.raises(PrecisionError, match=message) as caught:
        QuantSpec(fmt, **settings)
    assert [problem.keys for problem in caught.value.problems] == [tuple(keys.split())]


def test_all_problems_are_told() -> None:
    with pytest.raises(PrecisionError) as caught:
        QuantSpec(E4M3, scale_source="mse", history=4, margin=1, hadamard=True)
    assert [problem.keys[0] for problem in caught.value.problems] == ["history", "margin", "hadamard"]


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
