"""The linear layer under ``torch.compile(fullgraph=True)``: one graph, the gradients of eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fp8train.layers.fp8_weight import ResidentFp8Weight
from fp8train.layers.linear import Linear, SinkSlot
from fp8train.numerics.grad_sink import register_sink
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.connecting import CPU, connect, connect_resident, state_of

SLOW = pytest.mark.slow


class Mlp(nn.Module):
    """Two linears, a nonlinearity and a residual; in and out features need padding."""

    def __init__(self, dtype: torch.dtype, prefix: str = "") -> None:
        super().__init__()
        self.up = Linear(40, 72, bias=True, dtype=dtype, name=f"{prefix}up")
        self.down = Linear(72, 40, bias=False, dtype=dtype, name=f"{prefix}down")
        generator = torch.Generator().manual_seed(2)
        for layer in self.linears:
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    @property
    def linears(self) -> tuple[Linear, Linear]:
        return self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class BufferSink:
    """Adds contributions to one buffer per layer."""

    def __init__(self, layers: tuple[Linear, ...]) -> None:
        number = register_sink(self)
        self.buffers = [torch.zeros_like(layer.weight, requires_grad=False) for layer in layers]
        self.slots = [SinkSlot(number, torch.tensor(i), buffer) for i, buffer in enumerate(self.buffers)]

    @torch.no_grad()
    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        self.buffers[slot].add_(compute())


def build(
    dtype: torch.dtype, *, fp8: bool, with_sink: bool, recorder: CastRecorder | None = None
) -> tuple[Mlp, BufferSink | None]:
    model = Mlp(dtype)
    sink = BufferSink(model.linears) if with_sink else None
    for layer, slot in zip(model.linears, [None, None] if sink is None else sink.slots, strict=True):
        if fp8:
            connect(layer, LinearQuant(), recorder=recorder, sink_slot=slot)
        elif slot is not None:
            layer.connect(sink_slot=slot)
    return model, sink


def step(
    model: Mlp, call: Callable[[Tensor], Tensor], sink: BufferSink | None, dtype: torch.dtype
) -> list[Tensor]:
    """Two micro-batches; output of the last, gradients of all."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.linears:
        layer.quantize_weight()
        layer.zero_grad()
    for buffer in sink.buffers if sink else []:
        buffer.zero_()
    for _ in range(2):
        x = torch.randn(3, 7, 40, generator=generator, dtype=dtype).requires_grad_()
        output = call(x)
        output.square().sum().backward()
    assert x.grad is not None
    assert model.up.bias is not None
    assert model.up.bias.grad is not None
    weights = sink.buffers if sink else [layer.weight.grad for layer in model.linears]
    return [output.detach(), x.grad, model.up.bias.grad, *(w.clone() for w in weights if w is not None)]


def _case(dtype: torch.dtype, fp8: bool, with_sink: bool, *marks: pytest.MarkDecorator) -> Any:
    """One compilation: seconds, so most are slow."""
    words = (str(dtype).removeprefix("torch."), "fp8" if fp8 else "high", "sink" if with_sink else "autograd")
    return pytest.param(dtype, fp8, with_sink, id="-".join(words), marks=marks)


@pytest.mark.parametrize(
    ("dtype", "fp8", "with_sink"),
    [
        _case(torch.float64, True, True),
        _case(torch.float32, True, False),
        _case(torch.float32, False, True),
        _case(torch.float64, True, False, SLOW),
        _case(torch.float64, False, True, SLOW),
        _case(torch.float64, False, False, SLOW),
        _case(torch.float32, True, True, SLOW),
        _case(torch.float32, False, False, SLOW),
    ],
)
def test_compiled_gradients_equal_eager_ones(dtype: torch.dtype, fp8: bool, with_sink: bool) -> None:
    torch._dynamo.reset()
    model, sink = build(dtype, fp8=fp8, with_sink=with_sink)
    expected = step(model, model, sink, dtype)
    assert len(expected) == 5
    got = step(model, torch.compile(model, fullgraph=True), sink, dtype)
    for a, b in zip(got, expected, strict=True):
        assert b.any()
        relative = float((a - b).abs().max() / b.abs().max())
        assert relative <= (1e-6 if dtype == torch.float32 else 1e-14)


def test_compiled_layer_follows_the_weight_without_new_graphs() -> None:
    """A step changes the weight and its payload; the graph of the first step serves them all."""
    torch._dynamo.reset()
    model, sink = build(torch.float64, fp8=True, with_sink=True)
    compiled = torch.compile(model, fullgraph=True)
    step(model, compiled, sink, torch.float64)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(3):
        with torch.no_grad():
            for layer in model.linears:
                layer.weight.mul_(-1.5)
        got, expected = step(model, compiled, sink, torch.float64), step(model, model, sink, torch.float64)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13 * float(b.abs().max()))
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_layer_records_cast_statistics() -> None:
    """A sampled step takes one more graph and writes the rows that eager mode writes."""
    torch._dynamo.reset()
    sites = [f"{name}/{use}" for name in ("up", "down") for use in ("x", "w", "grad_output")]
    recorder = CastRecorder(sites, CPU)
    model, sink = build(torch.float64, fp8=True, with_sink=True, recorder=recorder)
    compiled = torch.compile(model, fullgraph=True)
    step(model, compiled, sink, torch.float64)
    assert recorder.collect() == {}
    recorder.active = True
    rows = []
    for call in (compiled, model):
        recorder.rows.fill_(torch.nan)
        step(model, call, sink, torch.float64)
        for layer in model.linears:
            layer.record_weight()
        rows.append(recorder.rows.clone())
    assert list(recorder.collect()) == sites
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-5)


def _delayed() -> LinearQuant:
    e4 = QuantSpec(E4M3, scale_source="delayed", history=4)
    e5 = QuantSpec(E5M2, scale_source="delayed", history=2)
    spaced = QuantSpec(E4M3, scale_source="delayed", margin=1)
    return LinearQuant(
        output_x=e4,
        output_w=e4,
        grad_input_grad_output=e5,
        grad_weight_grad_output=spaced,
        grad_weight_x=e4,
        grad_input_w=spaced,
        keep_w="requantise",
    )


def _steps(compile_it: bool, *, resident: bool, interleaved: bool) -> list[Tensor]:
    """Three steps with delayed scales; outputs, gradients and the scale state after each."""
    model = Mlp(torch.float64)
    masters = [layer.weight.detach().float() for layer in model.linears]
    state = state_of({layer.name: _delayed() for layer in model.linears})
    sink = BufferSink(model.linears)
    for layer, master, slot in zip(model.linears, masters, sink.slots, strict=True):
        if resident:
            connect_resident(layer, _delayed(), scale_state=state, sink_slot=slot).fill(master)
        else:
            connect(layer, _delayed(), scale_state=state, sink_slot=slot)
    call = torch.compile(model, fullgraph=True) if compile_it else model
    found: list[Tensor] = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        inputs = [
            (torch.randn(3, 7, 40, generator=generator, dtype=torch.float64) * 2**number).requires_grad_()
            for _ in range(2)
        ]
        losses = []
        with state.recording():
            for x in inputs:
                for layer in model.linears:
                    layer.quantize_weight()
                losses.append(call(x).square().sum())
                if not interleaved:
                    losses.pop().backward()
            for loss in losses:  # a pipeline's order: forwards first
                loss.backward()
        found += [state.amaxes.clone(), *(x.grad for x in inputs if x.grad is not None)]
        state.advance(lambda tensor: None, applied=True)
        found += [state.scales.clone(), *(buffer.clone() for buffer in sink.buffers)]
        for layer, master in zip(model.linears, masters, strict=True):
            master.mul_(-1.5)
            if isinstance(layer._fp8_weight, ResidentFp8Weight):
                layer._fp8_weight.fill(master)
            else:
                with torch.no_grad():
                    layer.weight.copy_(master)
    return found


@pytest.mark.parametrize(
    ("interleaved", "resident"),
    [
        pytest.param(False, True, id="1F1B-resident"),
        pytest.param(True, False, id="forwards first-cached"),
        pytest.param(False, False, id="1F1B-cached", marks=SLOW),
        pytest.param(True, True, id="forwards first-resident", marks=SLOW),
    ],
)
def test_compiled_delayed_scales(resident: bool, interleaved: bool) -> None:
    """One graph for warm-up and after, the amaxes and gradients of eager mode, weights resident or not."""
    torch._dynamo.reset()
    expected = _steps(False, resident=resident, interleaved=interleaved)
    counters.clear()
    got = _steps(True, resident=resident, interleaved=interleaved)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(got) == len(expected) == 3 * 6
    for a, b in zip(got, expected, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13 * float(b.abs().max()))


def test_blocks_with_delayed_scales_share_a_graph() -> None:
    """Slots are tensors, so another block's slots are no reason to compile again."""
    torch._dynamo.reset()
    models = [Mlp(torch.float64, f"layers.{i}.") for i in range(3)]
    layers = [layer for model in models for layer in model.linears]
    state = state_of({layer.name: _delayed() for layer in layers})
    for layer in layers:
        connect(layer, _delayed(), scale_state=state)
        layer.quantize_weight()
    for model in models:
        model.compile(fullgraph=True)
    counters.clear()
    x = torch.randn(3, 7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        with state.recording():
            for layer in layers:
                layer.quantize_weight()
            y = x.clone().requires_grad_()
            for model in models:
                y = model(y)
            y.square().sum().backward()
        assert bool((state.amaxes > 0).all())
        state.advance(lambda tensor: None, applied=True)
    assert counters["stats"]["unique_graphs"] == 1
