"""Which quantisations of a linear are refused, and how they read."""

from collections.abc import Callable
from typing import Any

import pytest

from fp8train.precision.linear_gemms import Keep, LinearQuant
from fp8train.precision.number_formats import E2M1, E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.problems import PrecisionError
from fp8train.precision.scale_blocks import DIRECTED, TWO_LEVELS

E4, E5 = QuantSpec(E4M3), QuantSpec(E5M2)
SPACED = QuantSpec(E4M3, margin=1)
DELAYED = QuantSpec(E4M3, scale_source="delayed")


def test_defaults_are_the_standard_recipe() -> None:
    quant = LinearQuant()
    assert (quant.output_x, quant.output_w, quant.grad_input_w, quant.grad_weight_x) == (E4, E4, E4, E4)
    assert (quant.grad_input_grad_output, quant.grad_weight_grad_output) == (E5, E5)
    assert str(quant) == "x=e4m3:cur/tensor/pow2 w=e4m3:cur/tensor/pow2 grad_output=e5m2:cur/tensor/pow2"


@pytest.mark.parametrize(
    ("keys", "build"),
    [
        (("output.x", "output.w"), lambda: LinearQuant(output_x=E5, output_w=E5, keep_w="bf16")),
        (("grad_input.grad_output", "grad_input.w"), lambda: LinearQuant(grad_input_w=E5)),
        (("grad_weight.grad_output", "grad_weight.x"), lambda: LinearQuant(grad_weight_x=E5)),
    ],
)
def test_two_e5m2_operands_are_refused(keys: tuple[str, str], build: Callable[[], LinearQuant]) -> None:
    with pytest.raises(PrecisionError) as caught:
        build()
    first, second = (key.rpartition(".")[2] for key in keys)
    assert caught.value.problems == (
        (
            f"{first} and {second} are both e5m2, which no hardware multiplies; write e4m3 for one of them",
            tuple(f"{key}.format" for key in keys),
        ),
    )


def test_same_needs_equal_specs_and_all_problems_are_told() -> None:
    with pytest.raises(PrecisionError) as caught:
        LinearQuant(grad_weight_x=SPACED, output_w=SPACED)
    assert [problem.keys for problem in caught.value.problems] == [
        ("keep_x", "output.x", "grad_weight.x"),
        ("keep_w", "output.w", "grad_input.w"),
    ]
    assert "keep_x: same reuses the payload of output.x, but grad_weight.x is set" in str(caught.value)
    assert "keep_w: same reuses the payload of output.w, but grad_input.w is set" in str(caught.value)


@pytest.mark.parametrize("keep", ["requantise", "second_copy"])
def test_a_second_cast_needs_different_specs(keep: Keep) -> None:
    with pytest.raises(
        PrecisionError,
        match=rf"^keep_x, output.x, grad_weight.x: keep_x: {keep} changes nothing.*write same$",
    ):
        LinearQuant(keep_x=keep)
    with pytest.raises(
        PrecisionError, match=rf"^keep_w, output.w, grad_input.w: keep_w: {keep} changes nothing.*write same$"
    ):
        LinearQuant(keep_w=keep)
    LinearQuant(keep_x=keep, grad_weight_x=SPACED)
    LinearQuant(keep_w=keep, grad_input_w=SPACED)


def test_directed_specs_are_other_quantisations_for_each_gemm() -> None:
    for granularity in DIRECTED - TWO_LEVELS:
        spec = QuantSpec(E4M3, granularity=granularity)
        assert spec.directed
        uses = dict.fromkeys(
            ("output_x", "output_w", "grad_input_grad_output", "grad_input_w"), spec
        ) | dict.fromkeys(("grad_weight_grad_output", "grad_weight_x"), spec)
        with pytest.raises(ValueError, match=r"keep_x: same .* lie along .* write second_copy"):
            LinearQuant(**uses, keep_w="second_copy")
        with pytest.raises(ValueError, match=r"keep_w: same .* lie along"):
            LinearQuant(**uses, keep_x="bf16")
        quant = LinearQuant(**uses, keep_x="second_copy", keep_w="requantise")
        assert set(quant.casts()) == {
            *("output.x", "output.w", "grad_input.grad_output", "grad_weight.x"),
            *("grad_input.w", "grad_weight.grad_output"),
        }
    square = QuantSpec(E4M3, granularity="block_128x128")
    assert not square.directed
    with pytest.raises(ValueError, match="keep_w: second_copy changes nothing"):
        LinearQuant(output_w=square, grad_input_w=square, keep_w="second_copy")


def test_grad_weight_in_high_precision_needs_the_unquantised_input() -> None:
    with pytest.raises(PrecisionError, match=r"fp8: false .* keep_x is same; write keep_x: bf16") as caught:
        LinearQuant(grad_weight_fp8=False)
    assert caught.value.problems[0].keys == ("keep_x", "grad_weight.fp8")
    quant = LinearQuant(grad_weight_fp8=False, keep_x="bf16")
    assert set(quant.casts()) == {"output.x", "output.w", "grad_input.grad_output"}
    assert not quant.in_fp8("grad_weight")
    assert "grad_weight=high precision" in str(quant)


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
    with pytest.raises(ValueError, match=r"grad_weight\.x is set differently"):
        LinearQuant(output_x=DELAYED, grad_weight_x=QuantSpec(E4M3, scale_source="delayed", history=8))


NV = QuantSpec(E2M1, granularity="nv_1x16", power_of_two=False)
TRANSFORMED = QuantSpec(E2M1, granularity="nv_1x16", power_of_two=False, hadamard=True)
USES = ("output_x", "output_w", "grad_input_grad_output", "grad_input_w")
NVFP4: dict[str, Any] = {
    **dict.fromkeys((*USES, "grad_weight_grad_output", "grad_weight_x"), NV),
    "keep_x": "bf16",
    "keep_w": "second_copy",
}


@pytest.mark.parametrize(
    ("fields", "key", "message"),
    [
        ({"output_w": E4}, "output.w.format", "output.w is e4m3 and others are e2m1"),
        ({"grad_weight_x": TRANSFORMED}, "grad_weight.x.hadamard", "both are transformed"),
        ({"output_x": TRANSFORMED}, "output.x.hadamard", "built for grad_weight's operands only"),
    ],
)
def test_refused_of_nvfp4(fields: dict[str, Any], key: str, message: str) -> None:
    assert LinearQuant(**NVFP4).is_nvfp4
    with pytest.raises(PrecisionError, match=message) as caught:
        LinearQuant(**NVFP4 | fields)
    assert caught.value.problems[0].keys[0] == key


def test_str_shows_everything_that_is_not_standard() -> None:
    quant = LinearQuant(
        keep_x="requantise",
        grad_weight_x=SPACED,
        keep_w="bf16",
        grad_weight_grad_output=E4,
        fast_accumulation=True,
    )
    assert str(quant).split()[3:] == [
        "grad_weight.grad_output=e4m3:cur/tensor/pow2",
        "keep_x=requantise(e4m3:cur/tensor/pow2-1)",
        "keep_w=bf16(e4m3:cur/tensor/pow2)",
        "fast_accumulation",
    ]
