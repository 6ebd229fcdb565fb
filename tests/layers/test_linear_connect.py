"""A linear is connected once, to what fits together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.layers.fp8_weight import FP8_WEIGHTS
from fp8train.layers.linear import Linear, SinkSlot
from fp8train.layers.linear_plan import Holding
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.connecting import CPU, connect, plan_of, state_of

NAME = "layers.0.mlp.up"
E4 = QuantSpec(E4M3, scale_source="delayed")
DELAYED = replace(LinearQuant(), output_w=E4, grad_input_w=E4)


def make(shape: tuple[int, int] = (24, 40)) -> Linear:
    layer = Linear(shape[1], shape[0], bias=False, dtype=torch.float32, name=NAME)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    return layer


def recorder() -> CastRecorder:
    return CastRecorder([f"{NAME}/{use}" for use in ("x", "w", "grad_output")], CPU)


def slot() -> SinkSlot:
    return SinkSlot(0, torch.tensor(0), torch.zeros(24, 40))


def parts(quant: LinearQuant, holding: Holding = "cached", **changes: Any) -> dict[str, Any]:
    """Arguments of ``connect`` that fit a layer of :func:`make`, but for ``changes``."""
    plan = plan_of(quant, torch.float32, holding)
    state = state_of({NAME: quant}) if quant == DELAYED else None
    made = make().make_fp8_weight(plan, scale_state=state, recorder=None)
    return {"plan": plan, "weight": made, "scale_state": state, **changes}


@pytest.mark.parametrize("weight", [None, "cached", "in_forward", "at_use", "resident", "loaded"])
def test_what_fits_is_connected_and_a_second_time_refused(weight: Holding | None) -> None:
    layer = make()
    arguments = {} if weight is None else parts(LinearQuant(), weight)
    layer.connect(**arguments)
    assert layer.plan == arguments.get("plan")
    assert layer.casts_in_forward is (weight in ("in_forward", "at_use"))
    assert layer.fp8_weight_is_resident is (weight in ("resident", "loaded"))
    for again in ({}, arguments, {"sink_slot": slot()}):
        with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.up is connected already; .* once"):
            layer.connect(**again)
    assert layer.plan == arguments.get("plan")
    assert layer.sink_slot is None


def test_without_a_connection_it_multiplies_in_high_precision_and_autograd_gets_the_gradient() -> None:
    layer, x = make(), torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    y = layer(x)
    y.sum().backward()
    expected = x.double() @ layer.weight.detach().double().t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(24, 40))


def test_making_the_weight_changes_nothing() -> None:
    layer = make()
    before = layer.weight.detach().clone()
    for kind, expected in FP8_WEIGHTS.items():
        plan = plan_of(LinearQuant(), torch.float32, kind)  # type: ignore[arg-type]
        made = layer.make_fp8_weight(plan, scale_state=None, recorder=None)
        assert type(made) is expected
    assert layer.plan is None and not layer.fp8_weight_is_resident
    assert torch.equal(layer.weight, before)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "FP8 copies without a plan": (
        lambda: {"weight": parts(LinearQuant())["weight"], "arrived": lambda: None},
        "multiplies in high precision, which has no use for weight, arrived",
    ),
    "statistics without a plan": (
        lambda: {"recorder": recorder()},
        "multiplies in high precision, which has no use for recorder",
    ),
    "a scale state without a plan": (
        lambda: {"scale_state": state_of({NAME: DELAYED})},
        "has a scale state but no delayed scales",
    ),
    "a scale state without delayed scales": (
        lambda: parts(LinearQuant(), scale_state=state_of({NAME: DELAYED})),
        "has a scale state but no delayed scales",
    ),
    "delayed scales without a scale state": (
        lambda: parts(DELAYED, scale_state=None),
        "has delayed scales but no scale state",
    ),
    "delayed scales without a scale state, cast in forward": (
        lambda: parts(DELAYED, "in_forward", scale_state=None),
        "has delayed scales but no scale state",
    ),
    "no FP8 weight": (
        lambda: parts(LinearQuant(), weight=None),
        "has a plan with a weight that is cached, but got no FP8 weight; use make_fp8_weight",
    ),
    "copies beside a cast in forward": (
        lambda: {**parts(LinearQuant()), "plan": plan_of(LinearQuant(), torch.float32, "in_forward")},
        "has a plan with a weight that is in_forward, but got a CachedFp8Weight",
    ),
    "another kind of weight": (
        lambda: {**parts(LinearQuant(), "resident"), "plan": plan_of(LinearQuant(), torch.float32)},
        "has a plan with a weight that is cached, but got a ResidentFp8Weight",
    ),
    "another quantisation": (
        lambda: {**parts(LinearQuant()), "plan": plan_of(LinearQuant(keep_w="bf16"), torch.float32)},
        "got an FP8 weight of another plan or shape",
    ),
    "another shape": (
        lambda: parts(
            LinearQuant(),
            weight=make((40, 24)).make_fp8_weight(
                plan_of(LinearQuant(), torch.float32), scale_state=None, recorder=None
            ),
        ),
        "got an FP8 weight of another plan or shape",
    ),
    "two recorders": (
        lambda: parts(LinearQuant(), recorder=recorder()),
        "got an FP8 weight whose statistics go to another recorder",
    ),
    "a gradient of a loaded weight": (
        lambda: parts(LinearQuant(), "loaded", sink_slot=slot()),
        "holds a loaded weight, .* but got a gradient sink",
    ),
    "rows of a cached weight": (
        lambda: parts(LinearQuant(), arrived=lambda: None),
        "waits for rows from other ranks, but they send rows of resident weights, not cached",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_and_nothing_is_changed(case: str) -> None:
    arguments, message = REFUSED[case]
    layer = make()
    before = layer.weight.detach().clone()
    with pytest.raises(AssertionError, match=rf"layers\.0\.mlp\.up {message}"):
        layer.connect(**arguments())
    assert layer.plan is None and torch.equal(layer.weight, before)
    connect(layer, LinearQuant())  # still open


def test_delayed_scales_without_a_state_are_refused_when_the_weight_is_made() -> None:
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.up has delayed scales but no scale state"):
        connect(make(), DELAYED)


def test_a_resident_weight_is_awaited_wherever_it_is_read() -> None:
    layer, waits = make(), list[str]()
    arguments = parts(LinearQuant(), "resident", arrived=lambda: waits.append("wait"))
    layer.connect(**arguments)
    master = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    arguments["weight"].fill(master)
    readers: list[Callable[[], Tensor]] = [
        lambda: layer(torch.ones(2, 40)),
        layer.fp8_codes,
        layer.dequantized_weight,
    ]
    for number, read in enumerate(readers, start=1):
        assert not read().isnan().any()
        assert len(waits) == number
