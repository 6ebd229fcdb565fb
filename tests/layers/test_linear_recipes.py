"""A linear under each recipe of scales, against float64 products of the operands its GEMMs multiply.

As ``test_linear``, whose bound this uses; the operands come from the quantiser alone (proved in
tests/numerics), quantised along the dimension that each GEMM contracts.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.kernels.padding import padded
from fp8train.layers.fp8_operand import cropped, quantize_matrix, transposed
from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.layers.linear import Linear
from fp8train.numerics.cast import quantize
from fp8train.numerics.granularity import expand_scales
from fp8train.numerics.scale_state import ScaleState
from fp8train.numerics.statistics import FIELDS, CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.connecting import connect
from tests.layers.test_linear import CPU, DTYPES, Case, ListSink, assert_product, make, run, saved_by
from tests.training.tiny import tiny_config

RECIPES = ("mse", "cscale", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8")
SHAPES = [((3, 7), 40, 72), ((2, 75), 300, 136), ((1,), 16, 32)]
ROW = QuantSpec(E4M3, granularity="row")
OWN = {
    "requantise": LinearQuant(
        output_x=ROW,
        output_w=ROW,
        grad_input_w=ROW,
        grad_weight_x=ROW,
        keep_x="requantise",
        keep_w="requantise",
    ),
    "bf16": LinearQuant(
        output_x=ROW, output_w=ROW, grad_input_w=ROW, grad_weight_x=ROW, keep_x="bf16", keep_w="bf16"
    ),
    "squares of x": LinearQuant(
        output_x=QuantSpec(E4M3, granularity="block_128x128"),
        grad_weight_x=QuantSpec(E4M3, granularity="block_128x128"),
        grad_input_grad_output=QuantSpec(E5M2, granularity="mx_1x32"),
        grad_weight_grad_output=QuantSpec(E5M2, granularity="mx_1x32"),
    ),
}


def recipe(name: str) -> LinearQuant:
    config = tiny_config(["precision.gemm.fp8=true", f"precision.recipe={name}"])
    quant = config.precision.gemm.value()
    assert quant is not None
    return quant


def quant_of(name: str) -> LinearQuant:
    return OWN[name] if name in OWN else recipe(name)


def values(x: Tensor, spec: QuantSpec, contracted: int) -> Tensor:
    """What the FP8 operand stands for, float64."""
    if spec.scale_source == "mse":
        payload, scale_inv = quantize_matrix(x, spec, contracted=contracted)  # proved in test_mse_scale
    else:
        payload, scale_inv = quantize(x, spec, contracted=contracted)
    return payload.double() * expand_scales(scale_inv, x.shape).double()


def kept(source: Tensor, keep: str, forward: QuantSpec, backward: QuantSpec) -> Tensor:
    """The operand of backward, which contracts the other dimension."""
    if keep == "same":
        return values(source, forward, 1)
    if keep == "requantise":
        return values(values(source, forward, 1).float(), backward, 0)
    return values(source, backward, 0)


def check(case: Case, quant: LinearQuant, output: Tensor, grad_input: Tensor, grad_weight: Tensor) -> None:
    layer = case.layer
    x = case.x.detach().reshape(-1, layer.in_features)
    grad_output = case.grad_output.reshape(-1, layer.out_features)
    w = layer.weight.detach()
    operands = values(x, quant.output_x, 1), values(w, quant.output_w, 1).t()
    assert_product(output.reshape(-1, layer.out_features), *operands, 1.0)
    g = values(grad_output, quant.grad_input_grad_output, 1)
    back_w = kept(w, quant.keep_w, quant.output_w, quant.grad_input_w)
    assert_product(grad_input.reshape(-1, layer.in_features), g, back_w, 1.0)
    if not quant.grad_weight_fp8:
        assert_product(grad_weight, grad_output.t().double(), x.double(), 1.0)
        return
    g = values(grad_output, quant.grad_weight_grad_output, 0)
    back_x = kept(x, quant.keep_x, quant.output_x, quant.grad_weight_x)
    assert_product(grad_weight, g.t(), back_x, 1.0)


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("name", [*RECIPES, *OWN])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sink", [False, True], ids=["autograd", "sink"])
def test_equals_float64_of_the_operands(name: str, dtype: torch.dtype, with_sink: bool) -> None:
    quant = quant_of(name)
    for shape in SHAPES:
        sink = ListSink()  # alive until backward has run
        case = make(dtype, shape, quant=quant, sink=sink if with_sink else None)
        buffer = sink.buffers[0] if with_sink else None
        output, grad_input, grad_weight = run(case)
        if buffer is not None:
            assert grad_weight is None
            grad_weight = buffer
        check(case, quant, output, grad_input, grad_weight)


def test_a_token_with_an_infinity_spoils_its_own_output_only() -> None:
    case = make(torch.float32, ((20,), 48, 32), quant=recipe("rowwise"))
    clean = case.layer(case.x).detach()
    with torch.no_grad():
        case.x[4, 7] = math.inf
    output = case.layer(case.x).detach()
    assert torch.isnan(output[4]).all()
    others = torch.arange(20) != 4
    assert torch.equal(output[others], clean[others])
    _, _, grad_weight = run(case)
    assert grad_weight is not None
    assert torch.isnan(grad_weight[:, 7]).all()  # column 7 of x has a scale of its own there
    assert torch.isfinite(grad_weight[:, :7]).all()


def test_what_backward_keeps_under_each_recipe() -> None:
    """One byte an element for codes, two for BF16; a second copy beside them only of x."""
    kinds = {"rowwise": 1, "rowwise_gw_hp": 2, "blockwise": 1, "mxfp8": 1}
    for name, size in kinds.items():
        case = make(torch.bfloat16, ((64,), 256, 32), quant=recipe(name))
        saved = saved_by(case.layer, case.x)
        assert [t.element_size() for t in saved if t.shape == (64, 256)] == [size], name


@pytest.mark.parametrize("name", RECIPES)
def test_compiled_equals_eager(name: str) -> None:
    def layers(sink: ListSink) -> tuple[nn.Module, Linear]:
        case = make(torch.float32, ((40,), 48, 72), quant=recipe(name), sink=sink)
        return nn.Sequential(case.layer, nn.SiLU()), case.layer

    torch._dynamo.reset()
    case = make(torch.float32, ((40,), 48, 72))
    results = []
    for compiled in (False, True):
        sink = ListSink()
        module, layer = layers(sink)
        layer.quantize_weight()
        call = torch.compile(module, fullgraph=True) if compiled else module
        x = case.x.detach().clone().requires_grad_()
        output = call(x)
        output.backward(case.grad_output)
        results.append((output.detach(), x.grad, *sink.buffers))
    for eager, other in zip(*results, strict=True):
        assert eager.abs().max() > 0
        # The nonlinearity's last bit may differ in compiled code; a wrong code or scale is off by 2^-4.
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


def test_statistics_of_every_cast() -> None:
    """Rows of the recorder: log2 of the scale is the mean over rows, and a row's amax the tensor's."""
    recorder = CastRecorder(["layer/x", "layer/w", "layer/grad_output"], CPU)
    case = make(torch.float32, ((40,), 48, 72), quant=recipe("rowwise"), name="layer", recorder=recorder)
    recorder.active = True
    run(case)
    found = recorder.collect()
    for site, tensor in (("x", case.x), ("w", case.layer.weight), ("grad_output", case.grad_output)):
        amax = tensor.detach().abs().amax(dim=1).double()
        expected = torch.floor(torch.log2(448 / amax)).mean()
        assert found[f"layer/{site}"]["log2_scale"] == pytest.approx(float(expected), abs=1e-5)
        assert found[f"layer/{site}"]["saturated"] == 0
    assert set(found["layer/x"]) == set(FIELDS)


def test_dequantized_weight_undoes_padding_and_scales() -> None:
    for name in ("rowwise", "blockwise", "mxfp8"):
        case = make(torch.float32, ((3,), 300, 137), quant=recipe(name))
        expected = values(case.layer.weight.detach(), recipe(name).output_w, 1)
        assert torch.equal(case.layer.dequantized_weight(torch.float64), expected)


@pytest.mark.parametrize("granularity", ["tensor", "row", "block_1x128", "block_128x128", "mx_1x32"])
@pytest.mark.parametrize("contracted", [0, 1])
def test_padding_and_cropping_keep_the_values(granularity: str, contracted: int) -> None:
    x = torch.randn(37, 141, generator=torch.Generator().manual_seed(0))
    operand = quantize(x, QuantSpec(E4M3, granularity=granularity), contracted=contracted)
    wide = padded(operand)
    assert wide[0].shape == (48, 144)
    grown = wide[0].double() * expand_scales(wide[1], wide[0].shape).double()
    expected = operand[0].double() * expand_scales(operand[1], x.shape).double()
    assert torch.equal(grown[:37, :141], expected)
    assert torch.count_nonzero(grown[37:]) == torch.count_nonzero(grown[:, 141:]) == 0
    back = cropped(wide, 37, 141)
    assert torch.equal(back[0].view(torch.uint8), operand[0].view(torch.uint8))
    assert torch.equal(back[1], operand[1])
    turned = transposed(operand)
    assert torch.equal(turned[0].double() * expand_scales(turned[1], (141, 37)).double(), expected.t())


@pytest.mark.parametrize("name", ["rowwise", "blockwise", "mse"])
def test_scales_that_a_resident_weight_cannot_have_are_refused(name: str) -> None:
    message = r"with one scale from the amax of the whole, but output\.w\..* write weights: compute"
    with pytest.raises(ValueError, match=message):
        ResidentFp8Weight(recipe(name), torch.Size((32, 32)), CPU)


def test_a_constant_equal_to_the_current_scale_changes_nothing() -> None:
    """Static, current and delayed scales of one step's history agree where their scales are equal."""
    x = torch.randn(33, 47, generator=torch.Generator().manual_seed(1))
    current = quantize(x, QuantSpec(E4M3))
    exponent = int(-torch.log2(current[1]))
    constant = quantize(x, QuantSpec(E4M3, scale_source="constant", constant_exponent=exponent))
    delayed_spec = QuantSpec(E4M3, scale_source="delayed", history=1)
    state = ScaleState({"slot": delayed_spec}, CPU)
    for _ in range(2):
        with state.recording():
            delayed = quantize_matrix(x, delayed_spec, state.slot("slot", record=True), contracted=1)
        state.advance(lambda tensor: None, applied=True)
    assert float(state.scales[0]) == 2.0**exponent
    for other in (constant, delayed):
        assert torch.equal(other[0].view(torch.uint8), current[0].view(torch.uint8))
        assert torch.equal(other[1], current[1])


def test_the_plan_prints() -> None:
    layer = Linear(32, 32, bias=False, dtype=torch.bfloat16)
    connect(layer, recipe("mxfp8"))
    assert "x=e4m3:cur/mx_1x32/pow2" in repr(layer)
    assert "keep_x=second_copy(e4m3:cur/mx_1x32/pow2)" in repr(layer)
    assert F.silu(layer(torch.ones(2, 32, dtype=torch.bfloat16))).shape == (2, 32)
