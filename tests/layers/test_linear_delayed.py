"""A linear whose operands have delayed or constant scales.

A delayed scale is a constant during a step, so a layer with delayed scales must equal, bit for bit, a layer
whose specs are ``constant`` with the exponents that the rule gives; and that one the float64 products of
operands cast with torch alone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fp8train.layers.linear import Linear
from fp8train.layers.linear_plan import scale_slots
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.scale_state import ScaleState, named_events
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.connecting import CPU, connect, plan_of, state_of

K, N, ROWS = 40, 24, 21


def delayed(fmt: Format, *, history: int = 16, margin: int = 0) -> QuantSpec:
    return QuantSpec(fmt, scale_source="delayed", history=history, margin=margin)


E4, E5, SPACED = delayed(E4M3), delayed(E5M2), delayed(E4M3, margin=1)
STANDARD = LinearQuant(
    output_x=E4,
    output_w=E4,
    grad_input_grad_output=E5,
    grad_input_w=E4,
    grad_weight_grad_output=E5,
    grad_weight_x=E4,
)
QUANTS = {
    "same": STANDARD,
    "requantise": replace(
        STANDARD, keep_x="requantise", keep_w="requantise", grad_weight_x=SPACED, grad_input_w=SPACED
    ),
    "second copy": replace(
        STANDARD, keep_x="second_copy", keep_w="second_copy", grad_weight_x=SPACED, grad_input_w=SPACED
    ),
    "bf16": replace(STANDARD, keep_x="bf16", keep_w="bf16"),
    "two grad_outputs": replace(STANDARD, grad_weight_grad_output=delayed(E4M3, history=2)),
    "mixed": LinearQuant(grad_input_grad_output=E5, grad_weight_grad_output=E5),
}


def alone(tensor: Tensor) -> None:
    """The MAX all-reduce of one rank."""


def make(
    quant: LinearQuant,
    *,
    dtype: torch.dtype = torch.float32,
    name: str = "up",
    state: ScaleState | None = None,
    recorder: CastRecorder | None = None,
) -> Linear:
    layer = Linear(K, N, bias=False, dtype=dtype, name=name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(N, K, generator=generator) * 0.02)
    connect(layer, quant, scale_state=state, recorder=recorder)
    return layer


def with_state(
    quant: LinearQuant, *, dtype: torch.dtype = torch.float32, recorder: CastRecorder | None = None
) -> tuple[Linear, ScaleState]:
    state = state_of({"up": quant})
    return make(quant, dtype=dtype, state=state, recorder=recorder), state


def inputs(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, K, generator=generator, dtype=torch.float64) * scale
    grad_output = torch.randn(ROWS, N, generator=generator, dtype=torch.float64) * 1e-3 * scale
    return x.to(dtype).requires_grad_(), grad_output.to(dtype)


def gradients(layer: Linear, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """[output, grad_input, grad_weight]."""
    x.grad = layer.weight.grad = None
    output = layer(x)
    output.backward(grad_output)
    assert x.grad is not None and layer.weight.grad is not None
    return [output.detach(), x.grad.clone(), layer.weight.grad.clone()]


def train(layer: Linear, state: ScaleState, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    with state.recording():
        for batch in batches:
            gradients(layer, *batch)
    state.advance(alone, applied=True)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def as_constant(quant: LinearQuant, state: ScaleState, name: str = "up") -> LinearQuant:
    """``quant`` with every delayed scale replaced by its present value."""
    uses = {
        "output_x": "output.x",
        "output_w": "output.w",
        "grad_input_grad_output": "grad_input.grad_output",
        "grad_input_w": "grad_input.w" if quant.keep_w != "same" else "output.w",
        "grad_weight_grad_output": "grad_weight.grad_output"
        if quant.grad_weight_grad_output != quant.grad_input_grad_output
        else "grad_input.grad_output",
        "grad_weight_x": "grad_weight.x" if quant.keep_x != "same" else "output.x",
    }
    changes: dict[str, Any] = {}
    for field, use in uses.items():
        spec = getattr(quant, field)
        if spec.scale_source == "delayed":
            exponent = math.log2(float(state.slot(f"{name}/{use}", record=False).scale))
            assert exponent == int(exponent)
            changes[field] = QuantSpec(spec.format, scale_source="constant", constant_exponent=int(exponent))
    # A second copy at the same scale is the same payload, and is asked for in that way.
    for keep, forward, backward in (
        ("keep_x", "output_x", "grad_weight_x"),
        ("keep_w", "output_w", "grad_input_w"),
    ):
        if getattr(quant, keep) != "bf16" and changes.get(forward) == changes.get(backward) is not None:
            changes[keep] = "same"
    return replace(quant, **changes)


def cast_with(x: Tensor, spec: QuantSpec) -> Tensor:
    """The values of a constant-scale cast, float64, by torch alone."""
    assert spec.constant_exponent is not None
    scale = 2.0**spec.constant_exponent
    scaled = (x.detach().float() * scale).clamp(-spec.format.max, spec.format.max)
    return scaled.to(dtype_of(spec.format)).double() / scale


@pytest.mark.parametrize("name", QUANTS)
def test_slots_are_the_delayed_casts(name: str) -> None:
    uses = {
        "same": ["output.x", "output.w", "grad_input.grad_output"],
        "requantise": ["output.x", "output.w", "grad_input.grad_output", "grad_weight.x", "grad_input.w"],
        "two grad_outputs": ["output.x", "output.w", "grad_input.grad_output", "grad_weight.grad_output"],
        "mixed": ["grad_input.grad_output"],
    }
    uses["second copy"] = uses["bf16"] = uses["requantise"]
    slots = scale_slots("up", plan_of(QUANTS[name], torch.float32))
    assert list(slots) == [f"up/{use}" for use in uses[name]]
    assert all(slots[f"up/{use}"] == QUANTS[name].casts()[use] for use in uses[name])
    assert scale_slots("up", plan_of(LinearQuant(), torch.float32)) == {}


def test_constant_scales_equal_float64_of_the_operands() -> None:
    def constant(fmt: Format, exponent: int) -> QuantSpec:
        return QuantSpec(fmt, scale_source="constant", constant_exponent=exponent)

    quant = LinearQuant(
        output_x=constant(E4M3, 8),
        output_w=constant(E4M3, 10),
        grad_input_grad_output=constant(E5M2, 20),
        grad_input_w=constant(E4M3, 10),
        grad_weight_grad_output=constant(E5M2, 20),
        grad_weight_x=constant(E4M3, 8),
    )
    layer = make(quant, dtype=torch.float64)
    x, grad_output = inputs(5, dtype=torch.float64)
    output, grad_input, grad_weight = gradients(layer, x, grad_output)
    q = {
        "x": cast_with(x, quant.output_x),
        "w": cast_with(layer.weight, quant.output_w),
        "grad_output": cast_with(grad_output, quant.grad_input_grad_output),
    }
    assert (q["x"].abs() == 448 / 2**8).any()  # 1.75: the scale is fixed, so some inputs saturate
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(output, q["x"] @ q["w"].t(), **tight)
    torch.testing.assert_close(grad_input, q["grad_output"] @ q["w"], **tight)
    torch.testing.assert_close(grad_weight, q["grad_output"].t() @ q["x"], **tight)


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", QUANTS)
def test_delayed_equals_constant_at_the_rules_scales(name: str, dtype: torch.dtype) -> None:
    quant = QUANTS[name]
    layer, state = with_state(quant, dtype=dtype)
    for step in range(3):
        train(
            layer, state, [inputs(10 * step + micro, 2.0**-step * (1 + micro), dtype) for micro in range(2)]
        )
        with torch.no_grad():
            layer.weight.mul_(-1.7)
        assert bool((state.scales > 0).all())
        x, grad_output = inputs(99, 3.0, dtype)
        reference = make(as_constant(quant, state), dtype=dtype)
        with torch.no_grad():
            reference.weight.copy_(layer.weight)
        expected = gradients(reference, x, grad_output)
        assert equal(gradients(layer, x, grad_output), expected)
        current = replace(quant, **{f: QuantSpec(s.format, margin=s.margin) for f, s in _specs(quant)})
        assert not equal(gradients(_like(layer, current), x, grad_output), expected)


def _specs(quant: LinearQuant) -> list[tuple[str, QuantSpec]]:
    return [(name, value) for name, value in vars(quant).items() if isinstance(value, QuantSpec)]


def _like(layer: Linear, quant: LinearQuant) -> Linear:
    other = make(quant, dtype=layer.weight.dtype)
    with torch.no_grad():
        other.weight.copy_(layer.weight)
    return other


@pytest.mark.parametrize("recording", [False, True])
def test_the_first_step_scales_by_the_tensor_itself(recording: bool) -> None:
    """Warm-up is current scaling for every micro-batch, whatever came before it in the step."""
    layer, state = with_state(STANDARD)
    reference = make(LinearQuant())
    batches = [inputs(1), inputs(2, 8.0), inputs(3, 0.01)]
    expected = [gradients(reference, *batch) for batch in batches]
    if recording:
        with state.recording():
            found = [gradients(layer, *batch) for batch in batches]
    else:
        found = [gradients(layer, *batch) for batch in batches]
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not state.scales.any()
    assert bool(state.amaxes.any()) is recording


def test_amaxes_are_those_of_the_sources() -> None:
    layer, state = with_state(QUANTS["two grad_outputs"])
    batches = [inputs(1), inputs(2, 8.0), inputs(3, 0.01)]
    with state.recording():
        for batch in batches:
            gradients(layer, *batch)
    expected = {
        "up/output.x": max(float(x.detach().abs().max()) for x, _ in batches),
        "up/output.w": float(layer.weight.detach().abs().max()),
        "up/grad_input.grad_output": max(float(g.abs().max()) for _, g in batches),
        "up/grad_weight.grad_output": max(float(g.abs().max()) for _, g in batches),
    }
    assert dict(zip(state.names, state.amaxes.tolist(), strict=True)) == expected


def test_only_training_forwards_move_the_state() -> None:
    """Not an evaluation, a generation, a recomputation, nor the same micro-batch once more."""
    layer, state = with_state(QUANTS["requantise"])
    reference, other = with_state(QUANTS["requantise"])
    batches = [inputs(1), inputs(2, 4.0)]
    train(layer, state, batches)
    train(reference, other, batches)
    with torch.no_grad():
        layer(inputs(7, 1000.0)[0])  # an evaluation
    layer(inputs(8, 1000.0)[0]).sum().backward()  # gradients outside a training step
    with state.recording():
        for x, grad_output in [*batches, batches[0]]:
            checkpoint(layer, x, use_reentrant=False).backward(grad_output)
    with torch.no_grad():
        layer(inputs(9, 1000.0)[0])
    state.advance(alone, applied=True)
    train(reference, other, batches)
    tensors, expected = state.state_tensors(), other.state_tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", QUANTS)
def test_gradients_with_and_without_recomputation_are_equal(name: str) -> None:
    layer, state = with_state(QUANTS[name])
    train(layer, state, [inputs(1)])
    x, grad_output = inputs(2, 5.0)
    with state.recording():
        expected = gradients(layer, x, grad_output)
        amaxes = state.amaxes.clone()
        x.grad = layer.weight.grad = None
        output = checkpoint(layer, x, use_reentrant=False)
        output.backward(grad_output)
    assert x.grad is not None and layer.weight.grad is not None
    assert equal([output.detach(), x.grad, layer.weight.grad], expected)
    assert torch.equal(state.amaxes, amaxes)


def test_order_of_micro_batches_changes_no_gradient() -> None:
    batches = [inputs(seed, 2.0 ** (seed - 2)) for seed in range(4)]
    found = []
    for order in (batches, batches[::-1]):
        layer, state = with_state(STANDARD)
        for _ in range(2):
            train(layer, state, order)
        assert state.scales.all()
        results = {}
        with state.recording():
            for batch in order:
                results[id(batch)] = gradients(layer, *batch)
        found.append((state.amaxes.clone(), state.scales.clone(), [results[id(batch)] for batch in batches]))
    assert equal(found[0][:2], found[1][:2])
    assert all(equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_a_weights_amax_is_recorded_whoever_met_it_first() -> None:
    """An evaluation between two steps casts the new weight; the next training step still records it."""
    states = []
    for evaluate in (False, True):
        layer, state = with_state(STANDARD)
        train(layer, state, [inputs(1)])
        with torch.no_grad():
            layer.weight.mul_(4)
            if evaluate:
                layer(inputs(7)[0])
        train(layer, state, [inputs(2)])
        states.append(state)
    assert equal(*(list(state.state_tensors().values()) for state in states))
    newest = states[0].state_tensors()["scale_state/amax_history/up/output.w"][0]
    assert float(newest) == float(layer.weight.detach().abs().max())


def test_values_beyond_the_delayed_scale_saturate_and_are_counted() -> None:
    recorder = CastRecorder([f"up/{operand}" for operand in ("x", "w", "grad_output")], CPU)
    layer, state = with_state(STANDARD, recorder=recorder)
    train(layer, state, [inputs(1)])
    recorder.active = True
    x, grad_output = inputs(2, 64.0)
    output, *_ = gradients(layer, x, grad_output)
    rows = recorder.collect()
    for use, operand, source, fmt in (
        ("output.x", "x", x, E4M3),
        ("grad_input.grad_output", "grad_output", grad_output, E5M2),
    ):
        scale = float(state.slot(f"up/{use}", record=False).scale)
        over = (source.detach().double().abs() * scale > fmt.max).double().mean()
        assert over > 0.5
        assert rows[f"up/{operand}"]["saturated"] == pytest.approx(float(over), rel=1e-6)
        assert rows[f"up/{operand}"]["log2_scale"] == math.log2(scale)
    assert output.isfinite().all()
    train(layer, state, [inputs(2, 64.0)])
    gradients(layer, *inputs(2, 64.0))
    assert recorder.collect()["up/x"]["saturated"] == 0


@pytest.mark.parametrize("source", ["delayed", "constant"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("operand", ["x", "weight", "grad_output"])
def test_non_finite_operands_poison_the_product_and_no_scale(source: str, value: float, operand: str) -> None:
    layer, state = with_state(STANDARD)
    train(layer, state, [inputs(1)])
    if source == "constant":
        layer = make(as_constant(STANDARD, state))
    before = state.scales.clone()
    x, grad_output = inputs(2)
    with torch.no_grad():
        {"x": x, "weight": layer.weight, "grad_output": grad_output}[operand].view(-1)[3] = value
    with state.recording():
        found = gradients(layer, x, grad_output)
    finite = [bool(tensor.isfinite().all()) for tensor in found]
    poisoned = {"x": (0, 2), "weight": (0, 1), "grad_output": (1, 2)}[operand]
    assert finite == [i not in poisoned for i in range(3)]
    state.advance(alone, applied=False)
    assert torch.equal(state.scales, before)
    if source == "delayed":
        use = {"x": "output.x", "weight": "output.w", "grad_output": "grad_input.grad_output"}[operand]
        assert named_events(state.names, state.events) == {f"up/{use}": {"zero": 0, "non_finite": 1}}


def test_resume_in_the_middle() -> None:
    """Scales from a checkpoint, weights cast anew: the gradients that an unbroken run computes."""
    layer, state = with_state(STANDARD)
    for step in range(3):
        train(layer, state, [inputs(step)])
        with torch.no_grad():
            layer.weight.mul_(1.5)
    again, restored = with_state(STANDARD)
    saved = {name: tensor.clone() for name, tensor in state.state_tensors().items()}
    again(inputs(0)[0])  # a weight cast before the load is of no consequence
    for name, tensor in restored.state_tensors().items():
        tensor.copy_(saved[name])
    with torch.no_grad():
        again.weight.copy_(layer.weight)
    for step in range(3, 6):
        with state.recording(), restored.recording():
            a, b = gradients(layer, *inputs(step)), gradients(again, *inputs(step))
        assert equal(a, b)
        for one, one_state in ((layer, state), (again, restored)):
            one_state.advance(alone, applied=True)
            with torch.no_grad():
                one.weight.mul_(0.6)
    assert equal(list(state.state_tensors().values()), list(restored.state_tensors().values()))


def test_two_layers_share_one_state() -> None:
    """Slots are by name; specs in common are advanced together, each slot with its own amax."""
    state = state_of({"first": STANDARD, "second": QUANTS["mixed"]})
    first = make(STANDARD, name="first", state=state)
    second = make(QUANTS["mixed"], name="second", state=state)
    x, grad_output = inputs(1)
    with state.recording():
        first(x).backward(grad_output)
        F.silu(second(x)).backward(grad_output * 64)
    state.advance(alone, applied=True)
    scales = dict(zip(state.names, state.scales.tolist(), strict=True))
    assert set(scales) == {
        "first/output.x",
        "first/output.w",
        "first/grad_input.grad_output",
        "second/grad_input.grad_output",
    }
    assert scales["first/grad_input.grad_output"] > 16 * scales["second/grad_input.grad_output"] > 0


def test_print_shows_the_sources() -> None:
    block = nn.Sequential(with_state(replace(STANDARD, keep_w="bf16"))[0])
    recipe = "x=e4m3:delayed16max/tensor/pow2 w=e4m3:delayed16max/tensor/pow2 grad_output=e5m2:delayed16max"
    assert recipe in repr(block)
