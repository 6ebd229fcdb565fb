"""The linear layer against float64 products of the very operands its GEMMs multiply.

The operands are recomputed here from x, the weight and grad_output by the quantiser alone (proved in
tests/numerics). What remains between a GEMM and the float64 product is accumulation, at most
``(K + 4) · u · sum |a b|``, and one rounding to the output type (two where a bias is added).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.kernels.padding import Operand
from fp8train.layers import fp8_linear, fp8_operand
from fp8train.layers.fp8_operand import quantize_matrix
from fp8train.layers.linear import Alphas, Linear, SinkSlot
from fp8train.numerics.cast import quantize
from fp8train.numerics.grad_sink import register_sink
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.connecting import CPU, connect

STANDARD = Alphas()
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SHAPES = [((16,), 32, 48), ((3, 7), 40, 72), ((33,), 17, 33), ((2, 1, 1), 5, 3)]
"""(leading dims of x, in_features, out_features): aligned, and three that need padding."""

E4, E5 = QuantSpec(E4M3), QuantSpec(E5M2)
SPACED = QuantSpec(E4M3, margin=1)
FREE = QuantSpec(E4M3, power_of_two=False)
QUANTS = {
    "same": LinearQuant(),
    "all e4m3": LinearQuant(grad_input_grad_output=E4, grad_weight_grad_output=E4),
    "requantise": LinearQuant(
        keep_x="requantise", keep_w="requantise", grad_weight_x=SPACED, grad_input_w=QuantSpec(E4M3, margin=2)
    ),
    "second copy": LinearQuant(
        keep_x="second_copy", keep_w="second_copy", grad_weight_x=SPACED, grad_input_w=SPACED
    ),
    "bf16": LinearQuant(keep_x="bf16", keep_w="bf16", grad_weight_x=SPACED, grad_input_w=SPACED),
    "bf16, equal specs": LinearQuant(keep_x="bf16", keep_w="bf16"),
    "e5m2 weights": LinearQuant(
        output_w=E5, keep_w="requantise", grad_input_w=E4, grad_weight_grad_output=QuantSpec(E5M2, margin=1)
    ),
    "free scales": LinearQuant(
        output_x=FREE, output_w=FREE, grad_input_w=FREE, grad_weight_x=FREE, grad_input_grad_output=E5
    ),
    "free output.x": LinearQuant(output_x=FREE, keep_x="bf16"),
    "free output.w": LinearQuant(output_w=FREE, keep_w="second_copy"),
    "free grad_input.grad_output": LinearQuant(grad_input_grad_output=FREE),
    "free grad_input.w": LinearQuant(grad_input_w=FREE, keep_w="bf16"),
    "free grad_weight.grad_output": LinearQuant(grad_weight_grad_output=FREE),
    "free grad_weight.x": LinearQuant(grad_weight_x=FREE, keep_x="second_copy"),
}


class ListSink:
    """Adds contributions up by slot, or keeps them for later as a zero-bubble pipeline does."""

    def __init__(self, *, deferred: bool = False) -> None:
        self.number = register_sink(self)
        self.deferred = deferred
        self.queue: list[tuple[int, Callable[[], Tensor]]] = []
        self.buffers: list[Tensor] = []

    def slot_of(self, layer: Linear) -> SinkSlot:
        """A place for the layer, with the next of ``buffers``."""
        buffer = torch.zeros(layer.weight.shape, dtype=layer.weight.dtype)
        self.buffers.append(buffer)
        return SinkSlot(self.number, torch.tensor(len(self.buffers) - 1), buffer)

    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        self.queue.append((slot, compute))
        if not self.deferred:
            self.drain()

    @torch.no_grad()
    def drain(self) -> None:
        for slot, compute in self.queue:
            self.buffers[slot].add_(compute())
        self.queue.clear()


@dataclass
class Case:
    """A layer, what goes in and what comes back."""

    layer: Linear
    x: Tensor
    grad_output: Tensor


def make(
    dtype: torch.dtype,
    shape: tuple[tuple[int, ...], int, int] = SHAPES[1],
    *,
    quant: LinearQuant | None = None,
    bias: bool = False,
    alphas: Alphas = STANDARD,
    name: str = "linear",
    sink: ListSink | None = None,
    recorder: CastRecorder | None = None,
) -> Case:
    leading, in_features, out_features = shape
    generator = torch.Generator().manual_seed(11)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * std).to(dtype)

    layer = Linear(in_features, out_features, bias=bias, dtype=dtype, name=name, alphas=alphas)
    with torch.no_grad():
        layer.weight.copy_(normal(out_features, in_features, std=0.02))
        if layer.bias is not None:
            layer.bias.copy_(normal(out_features))
    sink_slot = None if sink is None else sink.slot_of(layer)
    if quant is not None:
        connect(layer, quant, recorder=recorder, sink_slot=sink_slot)
    elif sink_slot is not None:
        layer.connect(sink_slot=sink_slot)
    x = normal(*leading, in_features).requires_grad_()
    return Case(layer, x, normal(*leading, out_features, std=1e-4))


def run(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, grad_input, weight.grad)."""
    output = case.layer(case.x)
    output.backward(case.grad_output)
    assert case.x.grad is not None
    return output.detach(), case.x.grad, case.layer.weight.grad


def values(x: Tensor, spec: QuantSpec) -> Tensor:
    """What the FP8 operand stands for, float64."""
    payload, scale_inv = quantize(x, spec)
    return payload.double() * scale_inv.double()


def kept(source: Tensor, keep: str, forward: QuantSpec, backward: QuantSpec) -> Tensor:
    """The backward's operand, float64."""
    if keep == "same":
        return values(source, forward)
    if keep == "requantise":
        return values(values(source, forward).float(), backward)
    return values(source, backward)


def assert_product(got: Tensor, a: Tensor, b: Tensor, alpha: float, plus: Tensor | None = None) -> None:
    """``got = alpha · a @ b (+ plus)`` within the bound of the module docstring; a and b in float64."""
    expected, magnitude = alpha * (a @ b), abs(alpha) * (a.abs() @ b.abs())
    roundoff = ROUNDOFF[got.dtype]
    limit = (a.shape[1] + 4) * min(roundoff, 2.0**-24) * magnitude + roundoff * expected.abs()
    if plus is not None:
        expected = expected + plus.double()
        limit = limit * (1 + roundoff) + roundoff * expected.abs()
    error = (got.double() - expected).abs()
    assert got.shape == expected.shape
    assert (error <= limit).all(), f"worst excess {float((error - limit).max()):.3g}"


def check_fp8(
    case: Case, quant: LinearQuant, output: Tensor, grad_input: Tensor, grad_weight: Tensor
) -> None:
    layer, alphas = case.layer, case.layer.alphas
    x = case.x.detach().reshape(-1, layer.in_features)
    grad_output = case.grad_output.reshape(-1, layer.out_features)
    w = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    assert output.shape == (*case.x.shape[:-1], layer.out_features)
    assert grad_input.shape == case.x.shape
    out_x, out_w = values(x, quant.output_x), values(w, quant.output_w)
    assert_product(output.reshape(-1, layer.out_features), out_x, out_w.t(), alphas.output, bias)
    back_w = kept(w, quant.keep_w, quant.output_w, quant.grad_input_w)
    operand = values(grad_output, quant.grad_input_grad_output)
    assert_product(grad_input.reshape(-1, layer.in_features), operand, back_w, alphas.grad_input)
    back_x = kept(x, quant.keep_x, quant.output_x, quant.grad_weight_x)
    operand = values(grad_output, quant.grad_weight_grad_output)
    assert_product(grad_weight, operand.t(), back_x, alphas.grad_weight)


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_sink", [False, True], ids=["autograd", "sink"])
def test_fp8_equals_float64_of_the_operands(
    name: str, dtype: torch.dtype, shape: tuple[tuple[int, ...], int, int], with_sink: bool
) -> None:
    quant = QUANTS[name]
    sink = ListSink()
    case = make(dtype, shape, quant=quant, bias=with_sink, sink=sink if with_sink else None)
    buffer = sink.buffers[0] if with_sink else None
    output, grad_input, grad_weight = run(case)
    assert output.dtype == grad_input.dtype == dtype
    if buffer is not None:
        assert grad_weight is None  # nothing in .grad
        grad_weight = buffer
        assert case.layer.bias is not None
        assert case.layer.bias.grad is not None
        rows = case.grad_output.reshape(-1, shape[2])
        torch.testing.assert_close(case.layer.bias.grad, rows.sum(0))
    assert grad_weight is not None
    check_fp8(case, quant, output, grad_input, grad_weight)


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_alphas_of_each_gemm(dtype: torch.dtype, with_sink: bool, bias: bool) -> None:
    alphas = Alphas(output=0.125, grad_input=3.0, grad_weight=-0.7)
    for quant in (QUANTS["same"], QUANTS["requantise"]):
        sink = ListSink()
        case = make(dtype, quant=quant, alphas=alphas, bias=bias, sink=sink if with_sink else None)
        buffer = sink.buffers[0] if with_sink else None
        output, grad_input, grad_weight = run(case)
        result = grad_weight if buffer is None else buffer
        assert result is not None
        check_fp8(case, quant, output, grad_input, result)


def test_the_quantisation_is_really_there() -> None:
    """FP8 differs from the unquantised product by about 2 %: an accidental high-precision path would not."""
    case, plain = make(torch.float32, quant=LinearQuant()), make(torch.float32)
    for got, reference in zip(run(case), run(plain), strict=True):
        assert got is not None
        assert reference is not None
        relative = float((got - reference).norm() / reference.norm())
        assert 0.01 < relative < 0.1


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_sink", [False, True], ids=["autograd", "sink"])
def test_high_precision_equals_f_linear(
    dtype: torch.dtype, shape: tuple[tuple[int, ...], int, int], bias: bool, with_sink: bool
) -> None:
    sink = ListSink()
    case = make(dtype, shape, bias=bias, sink=sink if with_sink else None)
    buffer = sink.buffers[0] if with_sink else None
    output, grad_input, grad_weight = run(case)
    layer = case.layer
    x, w = case.x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    b = None if layer.bias is None else layer.bias.detach().double()
    expected = F.linear(x, w, b)
    expected.backward(case.grad_output.double())
    tolerance = {"rtol": 4 * ROUNDOFF[dtype], "atol": 0.0}
    result = grad_weight if buffer is None else buffer
    for got, reference in ((output, expected), (grad_input, x.grad), (result, w.grad)):
        assert got is not None
        assert reference is not None
        assert got.dtype == dtype
        tolerance["atol"] = 4 * ROUNDOFF[dtype] * float(reference.detach().abs().max())
        torch.testing.assert_close(got.double(), reference.detach(), **tolerance)


def test_high_precision_gradcheck() -> None:
    layer = Linear(5, 4, bias=True, dtype=torch.float64)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, weight, bias))


def test_high_precision_alphas() -> None:
    scaled = make(torch.float64, alphas=Alphas(output=0.5, grad_input=3.0, grad_weight=-0.25))
    plain = make(torch.float64)
    for got, reference, alpha in zip(run(scaled), run(plain), (0.5, 3.0, -0.25), strict=True):
        assert got is not None
        assert reference is not None
        torch.testing.assert_close(got, reference * alpha, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("quant", [None, LinearQuant()], ids=["high", "fp8"])
@pytest.mark.parametrize("deferred", [False, True])
def test_sink_takes_micro_batches_in_any_order(quant: LinearQuant | None, deferred: bool) -> None:
    """Forwards before backwards (a pipeline), the layer used twice, contributions multiplied later."""
    sink = ListSink(deferred=deferred)
    case, alone = make(torch.float64, quant=quant, sink=sink), make(torch.float64, quant=quant)
    (buffer,) = sink.buffers
    inputs = [case.x.detach() * factor for factor in (1.0, -0.5, 2.0)]
    outputs = [case.layer(x) for x in inputs]
    for output in outputs[:2]:
        output.backward(case.grad_output)
    case.layer(inputs[0]).add(outputs[2]).backward(case.grad_output)
    assert len(sink.queue) == (4 if deferred else 0)
    sink.drain()
    for x in (*inputs, inputs[0]):
        alone.layer(x).backward(alone.grad_output)
    assert alone.layer.weight.grad is not None
    torch.testing.assert_close(buffer, alone.layer.weight.grad, rtol=1e-12, atol=1e-18)
    assert case.layer.weight.grad is None


def saved_by(layer: Linear, x: Tensor) -> list[Tensor]:
    """What a forward leaves for backward, seen as offloading hooks see it."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sink", [False, True])
def test_backward_keeps_fp8_operands(dtype: torch.dtype, with_sink: bool) -> None:
    """x of 21 x 40 pads to 32 x 48 bytes, the weight to 80 x 48; two FP32 scales. No input, no buffer."""
    for name in ("same", "requantise"):
        sink = ListSink()
        case = make(dtype, quant=QUANTS[name], bias=True, sink=sink if with_sink else None)
        saved = saved_by(case.layer, case.x)
        assert sorted((str(t.dtype), tuple(t.shape)) for t in saved) == [
            ("torch.float32", ()),
            ("torch.float32", ()),
            ("torch.float8_e4m3fn", (32, 48)),
            ("torch.float8_e4m3fn", (80, 48)),
        ]
        assert sum(t.numel() * t.element_size() for t in saved) == 32 * 48 + 80 * 48 + 8


def test_what_the_other_keep_modes_save() -> None:
    case = make(torch.bfloat16, quant=QUANTS["bf16"])
    assert [t.dtype for t in saved_by(case.layer, case.x)] == [torch.bfloat16] * 2
    case = make(torch.bfloat16, quant=QUANTS["second copy"])
    assert [t.dtype for t in saved_by(case.layer, case.x)] == [torch.float8_e4m3fn, torch.float32] * 2
    case = make(torch.bfloat16)
    assert [t.dtype for t in saved_by(case.layer, case.x)] == [torch.bfloat16] * 2


def test_aligned_activations_take_half_the_bytes_of_bf16() -> None:
    shape = ((64,), 128, 32)
    fp8 = [
        t for t in saved_by(*_pair(make(torch.bfloat16, shape, quant=LinearQuant()))) if t.shape == (64, 128)
    ]
    high = [t for t in saved_by(*_pair(make(torch.bfloat16, shape))) if t.shape == (64, 128)]
    assert [t.nbytes for t in fp8] == [64 * 128]
    assert [t.nbytes for t in high] == [2 * 64 * 128]


def _pair(case: Case) -> tuple[Linear, Tensor]:
    return case.layer, case.x


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Sources of every quantisation the layer makes."""
    sources: list[Tensor] = []

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Operand:
        sources.append(x)
        return quantize_matrix(x, *args, **kwargs)

    for module in (fp8_linear, fp8_operand):
        monkeypatch.setattr(module, "quantize_matrix", counted)
    return sources


def weight_casts(casts: list[Tensor], layer: Linear) -> int:
    count = sum(source is layer.weight for source in casts)
    casts.clear()
    return count


def test_weight_is_quantised_once_per_version(casts: list[Tensor]) -> None:
    case = make(torch.float32, quant=LinearQuant())
    layer = case.layer
    for _ in range(3):
        layer(case.x).backward(case.grad_output)
    assert weight_casts(casts, layer) == 1
    before = layer(case.x).detach()
    with torch.no_grad():
        layer.weight.mul_(-2)
    torch.testing.assert_close(layer(case.x).detach(), -2 * before, rtol=0, atol=0)
    layer(case.x)
    assert weight_casts(casts, layer) == 1
    layer.load_state_dict({"weight": torch.ones_like(layer.weight)})
    layer(case.x)
    assert weight_casts(casts, layer) == 1
    replacement = nn.Parameter(torch.full_like(layer.weight, 0.5))
    with torch.no_grad():
        while replacement._version < layer.weight._version:
            replacement.add_(0)
    layer.weight = replacement  # another parameter at the same version
    layer(case.x)
    assert weight_casts(casts, layer) == 1
    layer.quantize_weight()
    layer.float()
    layer(case.x)
    assert weight_casts(casts, layer) == 1  # after module.to() the storage may be another one
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.add_(1)
    expected = values(twin.weight, E4)
    assert_product(
        twin(case.x).detach().reshape(-1, 72), values(case.x.reshape(-1, 40), E4), expected.t(), 1.0
    )


def test_each_operand_is_cast_as_often_as_needed(casts: list[Tensor]) -> None:
    """Per forward and backward: x and grad_output once where their specs allow it."""
    expected = {"same": 2, "requantise": 4, "second copy": 3, "bf16": 4, "e5m2 weights": 4}
    for name, count in expected.items():
        case = make(torch.float32, quant=QUANTS[name])
        case.layer.quantize_weight()
        casts.clear()
        run(case)
        assert len(casts) == count, name


def test_backward_multiplies_only_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    real = fp8_linear.fp8_gemm

    def spy(*args: Tensor, fast_accumulation: bool = False, **options: object) -> Tensor:
        calls.append(fast_accumulation)
        return real(*args, fast_accumulation=fast_accumulation, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8_linear, "fp8_gemm", spy)
    every_spec_equal = LinearQuant(
        grad_input_grad_output=E4, grad_weight_grad_output=E4, fast_accumulation=True
    )
    case = make(torch.float32, quant=every_spec_equal)
    run(case)
    assert calls == [True, False, False]  # the reduced accumulator is for the forward GEMM only
    calls.clear()
    case.layer(case.x.detach()).backward(case.grad_output)  # the first layer: nobody wants grad_input
    assert len(calls) == 2
    calls.clear()
    case.layer.weight.requires_grad_(False)
    case.layer(case.x).backward(case.grad_output)
    assert len(calls) == 2


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("with_sink", [False, True])
def test_non_finite_operands_poison_what_they_enter(
    dtype: torch.dtype, value: float, with_sink: bool
) -> None:
    poisoned = {  # operand -> which of (output, grad_input, grad_weight) cannot be finite
        "x": (True, False, True),
        "weight": (True, True, False),
        "grad_output": (False, True, True),
    }
    for operand, expected in poisoned.items():
        for name in ("same", "requantise", "bf16"):
            sink = ListSink()
            case = make(dtype, quant=QUANTS[name], sink=sink if with_sink else None)
            buffer = sink.buffers[0] if with_sink else None
            source = {"x": case.x, "weight": case.layer.weight, "grad_output": case.grad_output}[operand]
            with torch.no_grad():
                source.view(-1)[3] = value
            output, grad_input, grad_weight = run(case)
            result = grad_weight if buffer is None else buffer
            assert result is not None
            for tensor, bad in zip((output, grad_input, result), expected, strict=True):
                assert bool(tensor.isfinite().all()) is not bad, (operand, name)


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype: torch.dtype) -> None:
    case = make(dtype, quant=LinearQuant(), bias=True)
    with torch.no_grad():
        case.x.zero_()
    output, grad_input, grad_weight = run(case)
    assert case.layer.bias is not None
    assert torch.equal(output, case.layer.bias.detach().expand_as(output))
    assert grad_weight is not None
    assert not grad_weight.any()
    assert grad_input.any()
    case = make(dtype, quant=LinearQuant())
    case.grad_output.zero_()
    _, grad_input, grad_weight = run(case)
    assert grad_weight is not None
    assert not grad_input.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("quant", [None, LinearQuant()], ids=["high", "fp8"])
def test_no_tokens(quant: LinearQuant | None) -> None:
    case = make(torch.float32, ((0,), 40, 72), quant=quant)
    output, grad_input, grad_weight = run(case)
    assert output.shape == (0, 72)
    assert grad_input.shape == (0, 40)
    assert grad_weight is not None
    assert not grad_weight.any()


def test_conversion_is_refused_in_fp8() -> None:
    layer = make(torch.float32, quant=LinearQuant(), name="layers.3.mlp.down").layer
    block = nn.Sequential(layer)
    converters: list[Callable[[], object]] = [block.bfloat16, block.half, block.double]
    converters += [lambda: block.to(torch.bfloat16), lambda: layer.to(torch.float64)]
    for convert in converters:
        with pytest.raises(TypeError, match=r"layers\.3\.mlp\.down runs in FP8 with torch\.float32 weights"):
            convert()
        assert layer.weight.dtype == torch.float32
    block.to("cpu")
    block.float()
    plain = make(torch.float32).layer
    assert plain.bfloat16().weight.dtype == torch.bfloat16


def test_print_shows_the_live_recipe() -> None:
    layer = make(torch.bfloat16, bias=True).layer
    assert repr(layer) == "Linear(40 -> 72, bias=True, bfloat16)"
    connect(layer, LinearQuant())
    recipe = "x=e4m3:cur/tensor/pow2 w=e4m3:cur/tensor/pow2 grad_output=e5m2:cur/tensor/pow2"
    assert repr(layer) == f"Linear(40 -> 72, bias=True, fp8[{recipe}])"


def test_cast_statistics_of_each_operand() -> None:
    recorder = CastRecorder([f"layers.0.mlp.up/{use}" for use in ("x", "w", "grad_output")], CPU)
    case = make(torch.float32, quant=LinearQuant(), name="layers.0.mlp.up", recorder=recorder)
    layer = case.layer
    run(case)
    assert recorder.collect() == {}  # not active
    recorder.active = True
    run(case)
    assert set(recorder.collect()) == {"layers.0.mlp.up/x", "layers.0.mlp.up/grad_output"}
    layer.record_weight()
    rows = recorder.collect()
    for use, source, fmt in (
        ("x", case.x, E4M3),
        ("w", layer.weight, E4M3),
        ("grad_output", case.grad_output, E5M2),
    ):
        row = rows[f"layers.0.mlp.up/{use}"]
        amax = float(source.detach().abs().max())
        assert row["amax"] == amax
        assert row["log2_scale"] == math.floor(math.log2(fmt.max / amax))
        assert row["rms"] == pytest.approx(float(source.detach().square().mean().sqrt()), rel=1e-5)
        assert (25 if fmt is E5M2 else 31) < row["snr_db"] < (28 if fmt is E5M2 else 34)
    with torch.no_grad():
        layer.weight.mul_(4)
    layer.quantize_weight()  # a cast of a sampled step records itself
    assert recorder.collect()["layers.0.mlp.up/w"]["amax"] == pytest.approx(
        4 * rows["layers.0.mlp.up/w"]["amax"]
    )
