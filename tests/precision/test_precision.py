"""Rules between the parts of precision."""

from typing import Any

import pytest

from fp8train.precision.gradients import Gradients
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E2M1, E4M3
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.precision import Precision
from fp8train.precision.problems import PrecisionError
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.precision.traffic import Traffic

ROWS = QuantSpec(E4M3, granularity="row")
MSE = QuantSpec(E4M3, scale_source="mse")
DELAYED = QuantSpec(E4M3, scale_source="delayed")
NV = QuantSpec(E2M1, granularity="nv_1x16", power_of_two=False)


def made_of(**parts: Any) -> Precision:
    usual = {"gemm": LinearQuant(), "gradient": Gradients(), "state": StateFormats(), "weights": "compute"}
    return Precision(**{**usual, "traffic": Traffic(), **parts})


def rows(keep_w: str) -> LinearQuant:
    return LinearQuant(output_w=ROWS, grad_input_w=ROWS, keep_w=keep_w)  # type: ignore[arg-type]


def nvfp4() -> LinearQuant:
    uses = ("output_x", "output_w", "grad_input_grad_output", "grad_input_w", "grad_weight_grad_output")
    specs: dict[str, Any] = {**dict.fromkeys(uses, NV), "grad_weight_x": NV}
    return LinearQuant(**specs, keep_x="bf16", keep_w="second_copy")


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        ({"gemm": None, "gradient": Gradients(format=E4M3)}, ["gradient.format gemm.fp8"]),
        ({"gemm": None, "state": StateFormats(StateFormat("bf16"))}, ["state gemm.fp8"]),
        (
            {"gemm": None, "weights": "fp8", "traffic": Traffic(output=True), "guard_action": "report"},
            ["weights gemm.fp8", "traffic gemm.fp8", "guard.action gemm.fp8"],
        ),
        ({"weights": "fp8", "guard_action": "bf16"}, ["guard.action weights"]),
        (
            {"gemm": LinearQuant(output_x=DELAYED, grad_weight_x=DELAYED), "guard_action": "bf16"},
            ["guard.action gemm.output.x.scale_source"],
        ),
        ({"traffic": Traffic(weights=True)}, ["traffic.weights weights"]),
        ({"gemm": LinearQuant(keep_w="bf16"), "weights": "fp8"}, ["weights gemm.keep_w"]),
        ({"smooth_swiglu": "channel", "weights": "fp8"}, ["gemm.smooth_swiglu weights"]),
        (
            {"gemm": rows("second_copy"), "weights": "fp8"},
            ["weights gemm.output.w.granularity"],
        ),
        (
            {"gemm": LinearQuant(output_w=MSE, grad_input_w=MSE), "weights": "fp8"},
            ["weights gemm.output.w.scale_source"],
        ),
        (
            {"gemm": LinearQuant(grad_weight_fp8=False, keep_x="bf16"), "traffic": Traffic(activations=True)},
            ["traffic.activations gemm.grad_weight.fp8"],
        ),
        (
            {"gemm": nvfp4(), "traffic": Traffic(activations=True, grad_output=True)},
            ["traffic.activations gemm.output.x.format", "traffic.grad_output gemm.output.x.format"],
        ),
    ],
)
def test_refused_with_all_keys(parts: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(PrecisionError) as caught:
        made_of(**parts)
    assert [" ".join(problem.keys) for problem in caught.value.problems] == keys


def test_parts_that_fit() -> None:
    made_of(gemm=None)
    made_of(weights="fp8", traffic=Traffic(True, True, True, True, True, True), guard_action="report")
    made_of(gemm=rows("requantise"), smooth_swiglu="channel", guard_action="bf16")
