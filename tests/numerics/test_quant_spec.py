"""Which quantisations of a linear are refused, and how they read."""

import pytest

from fp8train.numerics.formats import E4M3, E5M2
from fp8train.numerics.quant_spec import Keep, LinearQuant, QuantSpec

E4, E5 = QuantSpec(E4M3), QuantSpec(E5M2)
SPACED = QuantSpec(E4M3, margin=1)


def test_defaults_are_the_standard_recipe() -> None:
    quant = LinearQuant()
    assert (quant.output_x, quant.output_w, quant.grad_input_w, quant.grad_weight_x) == (E4, E4, E4, E4)
    assert (quant.grad_input_grad_output, quant.grad_weight_grad_output) == (E5, E5)
    assert str(quant) == "x=e4m3:cur/tensor/pow2 w=e4m3:cur/tensor/pow2 grad_output=e5m2:cur/tensor/pow2"


@pytest.mark.parametrize(
    ("gemm", "build"),
    [
        ("output", lambda: LinearQuant(output_x=E5, output_w=E5, keep_x="bf16", keep_w="bf16")),
        ("grad_input", lambda: LinearQuant(grad_input_w=E5, keep_w="second_copy")),
        ("grad_weight", lambda: LinearQuant(grad_weight_x=E5, keep_x="second_copy")),
    ],
)
def test_two_e5m2_operands_are_refused(gemm: str, build: object) -> None:
    assert callable(build)
    with pytest.raises(
        ValueError, match=rf"precision\.gemm\.{gemm} multiplies E5M2 by E5M2.*make one operand e4m3"
    ):
        build()


def test_same_needs_equal_specs() -> None:
    with pytest.raises(
        ValueError, match=r"keep_x: same reuses the payload of output\.x .*grad_weight\.x asks for e4m3.*-1"
    ):
        LinearQuant(grad_weight_x=SPACED)
    with pytest.raises(
        ValueError, match=r"keep_w: same reuses the payload of output\.w .*grad_input\.w asks for"
    ):
        LinearQuant(output_w=SPACED)


@pytest.mark.parametrize("keep", ["requantise", "second_copy"])
def test_a_second_cast_needs_different_specs(keep: Keep) -> None:
    with pytest.raises(ValueError, match=rf"keep_x: {keep} has no effect.*use same"):
        LinearQuant(keep_x=keep)
    with pytest.raises(ValueError, match=rf"keep_w: {keep} has no effect.*use same"):
        LinearQuant(keep_w=keep)
    LinearQuant(keep_x=keep, grad_weight_x=SPACED)
    LinearQuant(keep_w=keep, grad_input_w=SPACED)


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
