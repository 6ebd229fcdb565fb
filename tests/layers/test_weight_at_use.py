"""A weight that is cast in every forward and again in backward, against the one that is cast once a step: the
same bits, and nothing in FP8 that outlives the call."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.kernels import fused_op
from fp8train.layers import weight_in_forward
from fp8train.layers.fp8_operand import quantize_layouts
from fp8train.layers.linear import Linear
from fp8train.layers.linear_plan import Holding
from fp8train.layers.mlp import MLP
from fp8train.numerics.scale_state import ScaleState
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same
from tests.layers.connecting import CPU, connect, state_of
from tests.layers.test_linear import QUANTS, ListSink, saved_by
from tests.layers.test_linear_recipes import OWN, quant_of

D4 = QuantSpec(E4M3, scale_source="delayed", history=4)
D4_FREE = QuantSpec(E4M3, scale_source="delayed", history=2, power_of_two=False)
D5 = QuantSpec(E5M2, scale_source="delayed", history=4)
DELAYED = {
    "delayed": LinearQuant(D4, D4, D5, D4, D5, D4),
    "delayed, second copy": LinearQuant(
        D4, D4, D5, D4_FREE, D5, D4_FREE, keep_x="second_copy", keep_w="second_copy"
    ),
    "delayed, requantised": LinearQuant(
        D4, D4, D5, D4_FREE, D5, D4_FREE, keep_x="requantise", keep_w="requantise"
    ),
    "delayed, kept wide": LinearQuant(D4, D4, D5, D4_FREE, D5, D4_FREE, keep_x="bf16", keep_w="bf16"),
    "delayed copy of a row": LinearQuant(
        D4, QuantSpec(E4M3, granularity="row"), D5, D4, D5, D4, keep_w="second_copy"
    ),
}
RECIPES = ("mse", "cscale", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8", "nvfp4_simulated")
ALL = [*QUANTS, *RECIPES, *OWN, *DELAYED]
IN, OUT = 40, 72


def quant(name: str) -> LinearQuant:
    for table in (QUANTS, DELAYED):
        if name in table:
            return table[name]
    return quant_of(name)


def normal(seed: int, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


def layer_of(
    holding: Holding, name: str, dtype: torch.dtype, state: ScaleState | None = None, **parts: Any
) -> Linear:
    layer = Linear(IN, OUT, bias=False, dtype=dtype, name="layer")
    with torch.no_grad():
        layer.weight.copy_(normal(1, OUT, IN, dtype=dtype, std=0.02))
    connect(layer, quant(name), holding=holding, scale_state=state, **parts)
    return layer


def train(holding: Holding, name: str, dtype: torch.dtype, *, sinks: bool) -> dict[str, Tensor]:
    """Three optimizer steps of two micro-batches: all that a run would notice."""
    sink = ListSink()
    state = state_of({"layer": quant(name)})
    layer = Linear(IN, OUT, bias=False, dtype=dtype, name="layer")
    with torch.no_grad():
        layer.weight.copy_(normal(1, OUT, IN, dtype=dtype, std=0.02))
    connect(
        layer,
        quant(name),
        holding=holding,
        scale_state=state if state.names else None,
        sink_slot=sink.slot_of(layer) if sinks else None,
    )
    found = {}
    for step in range(3):
        with state.recording():
            for micro in range(2):
                seed = 10 * step + micro
                x = normal(seed + 100, 3, 7, IN, dtype=dtype).requires_grad_()
                output = layer(x)
                output.backward(normal(seed + 200, 3, 7, OUT, dtype=dtype, std=1e-4))
                assert x.grad is not None
                found |= {f"output {seed}": output.detach(), f"grad_input {seed}": x.grad}
        found[f"amaxes {step}"] = state.amaxes.clone()
        state.advance(lambda amaxes: None, applied=True)
        grad = sink.buffers[0] if sinks else layer.weight.grad
        assert grad is not None and grad.abs().max() > 0
        found[f"grad_weight {step}"] = grad.clone()
        with torch.no_grad():
            layer.weight.mul_(1.5 + step).add_(grad)
        layer.eval()
        with torch.no_grad():
            found[f"evaluation {step}"] = layer(normal(step, 5, IN, dtype=dtype))
    found["decoded"] = layer.dequantized_weight(torch.float64)
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gives_the_bits_of_a_cached_weight(name: str, dtype: torch.dtype) -> None:
    for sinks in (False, True):
        cached = train("cached", name, dtype, sinks=sinks)
        at_use = train("at_use", name, dtype, sinks=sinks)
        for key, tensor in cached.items():
            assert same(at_use[key], tensor), f"{key}, sinks: {sinks}"


@pytest.mark.parametrize("name", [name for name in ALL if name != "nvfp4_simulated"])
def test_as_gpus_cast_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fused casts leave partial maxima, and layouts that only one GEMM reads."""
    monkeypatch.setattr(fused_op, "fuses", lambda x: x.dtype != torch.float64)
    cached = train("cached", name, torch.bfloat16, sinks=True)
    at_use = train("at_use", name, torch.bfloat16, sinks=True)
    for key, tensor in cached.items():
        assert same(at_use[key], tensor), key


@pytest.mark.parametrize("name", ALL)
def test_nothing_in_fp8_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward keeps the parameter itself and at most 8 bytes of scales for each of its blocks."""
    codes: list[weakref.ref[Tensor]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        layouts = quantize_layouts(*args, **kwargs)
        codes.extend(weakref.ref(operand[0]) for operand in layouts)
        return layouts

    monkeypatch.setattr(weight_in_forward, "quantize_layouts", watched)
    state = state_of({"layer": quant(name)})
    layer = layer_of("at_use", name, torch.bfloat16, state if state.names else None)
    assert layer.weight_bytes == layer.weight.nbytes
    x = normal(5, 64, IN, dtype=torch.bfloat16).requires_grad_()
    output = layer(x)
    gc.collect()
    assert codes and not any(ref() is not None for ref in codes)
    output.backward(torch.ones_like(output))
    saved = saved_by(layer, x)
    pointers = [t.data_ptr() for t in saved]
    assert layer.weight.data_ptr() in pointers
    others = [t for t in saved if t.data_ptr() not in (layer.weight.data_ptr(), x.data_ptr())]
    of_x = sum(t.nbytes for t in others if t.element_size() < 4)
    assert of_x in (0, 64 * 48, 64 * 48 * 2)  # x alone: bf16 keeps it as it is, NVFP4's values are BF16
    assert sum(t.nbytes for t in others if t.element_size() >= 4) <= 8 * (64 + IN + OUT) + 64


def test_backward_neither_measures_nor_records_the_weight_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An amax that grows between forward and backward is not noticed: the codes are those of forward."""
    for name in ("same", "delayed", "delayed, second copy", "rowwise", "mse"):
        state = state_of({"layer": quant(name)})
        layer = layer_of("at_use", name, torch.float32, state if state.names else None)
        x = normal(3, 16, IN, dtype=torch.float32).requires_grad_()
        with state.recording():
            output = layer(x)
            recorded = state.amaxes.clone()
            weights = [i for i, slot in enumerate(state.names) if slot.endswith(".w")]
            assert bool((recorded[weights] == layer.weight.detach().abs().max()).all())
            with monkeypatch.context() as patched:
                patched.setattr(weight_in_forward, "measure", None)
                patched.setattr(weight_in_forward, "record_amax", None)
                output.backward(torch.ones_like(output))
            assert torch.equal(state.amaxes[weights], recorded[weights])


def test_the_parameter_may_lose_its_values_between_forward_and_backward() -> None:
    """What ZeRO-3 does: the storage is replaced by an empty one, and by another before backward."""
    for name in ALL:
        if name in DELAYED:
            continue
        expected = layer_of("cached", name, torch.bfloat16)
        layer = layer_of("at_use", name, torch.bfloat16)
        x = normal(3, 16, IN, dtype=torch.bfloat16)
        grads = []
        for each in (expected, layer):
            own = x.clone().requires_grad_()
            output = each(own)
            values = each.weight.data.clone()
            if each is layer:
                storage = weakref.ref(each.weight.data.untyped_storage())
                each.weight.data = torch.empty(0, dtype=values.dtype)
                gc.collect()
                assert storage() is None, name
                each.weight.data = values
            output.backward(torch.ones_like(output))
            grads.append((own.grad, each.weight.grad))
        for ours, theirs in zip(*reversed(grads), strict=True):
            assert ours is not None and theirs is not None and same(ours, theirs), name


def test_factors_per_column() -> None:
    """Smooth-SwiGLU per channel, in a weight cast in forward and kept, and in one that is cast again."""
    for name in ("same", "requantise", "second copy", "bf16", "rowwise", "blockwise"):
        found = []
        for holding in ("in_forward", "at_use"):
            mlp = MLP(
                hidden_size=32, ffn_hidden_size=64, activation="swiglu", bias=False, dtype=torch.float32
            )
            with torch.no_grad():
                for i, parameter in enumerate(mlp.parameters()):
                    parameter.copy_(normal(i, *parameter.shape, dtype=torch.float32, std=0.2))
            connect(mlp.down, quant(name), holding=holding)
            mlp.use_smooth_swiglu("channel")
            x = normal(9, 2, 8, 32, dtype=torch.float32).requires_grad_()
            y = mlp(x)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, mlp.down.weight.grad, mlp.up.weight.grad))
        for ours, theirs in zip(*found, strict=True):
            assert ours is not None and theirs is not None and same(ours, theirs), name


def test_statistics_are_those_of_a_cached_weight() -> None:
    found = []
    for holding in ("cached", "at_use"):
        recorder = CastRecorder(["layer/x", "layer/w", "layer/grad_output"], CPU)
        layer = layer_of(holding, "rowwise", torch.float32, recorder=recorder)
        recorder.active = True
        layer.quantize_weight()
        layer(normal(3, 16, IN, dtype=torch.float32).requires_grad_()).sum().backward()
        layer.record_weight()
        found.append(recorder.collect()["layer/w"])
    assert found[0] == found[1]
    assert found[0]["snr_db"] > 25
