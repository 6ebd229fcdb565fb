"""What a linear is connected to: a check that its parts fit together, and its delayed scales by operand
use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fp8train.layers.fp8_linear import CastSlots
from fp8train.layers.fp8_weight import FP8_WEIGHTS, Fp8Weight
from fp8train.layers.grad_weight_op import SinkSlot
from fp8train.layers.linear_plan import Fp8Plan, scale_slots
from fp8train.numerics.scale_state import ScaleSlot, ScaleState
from fp8train.numerics.statistics import CastRecorder


def contradiction(
    plan: Fp8Plan | None,
    weight: Fp8Weight | None,
    shape: torch.Size,
    recorder: CastRecorder | None,
    sink_slot: SinkSlot | None,
    arrived: Callable[[], None] | None,
) -> str | None:
    """What does not fit together among the arguments of :meth:`fp8train.layers.linear.Linear.connect`, as the
    rest of a sentence about a linear whose weight has this ``shape``; None if all does. Scale states are
    checked where slots are looked up (:func:`slots_by_use`)."""
    if plan is None:
        given = {"weight": weight, "recorder": recorder, "arrived": arrived}
        useless = ", ".join(name for name, value in given.items() if value is not None)
        return f"multiplies in high precision, which has no use for {useless}" if useless else None
    kind = FP8_WEIGHTS.get(plan.holding)
    if (weight is None) != (kind is None) or (kind is not None and not isinstance(weight, kind)):
        got = "no FP8 weight" if weight is None else f"a {type(weight).__name__}"
        return (
            f"has a plan with a weight that is {plan.holding}, but got {got}; "
            "use make_fp8_weight() with this plan"
        )
    if weight is not None:
        if weight.quant != plan.quant or weight.shape != shape:
            return "got an FP8 weight of another plan or shape; use make_fp8_weight() with this plan"
        if (None if weight.site is None else weight.site[0]) is not recorder:
            return "got an FP8 weight whose statistics go to another recorder than those of x and grad_output"
    if sink_slot is not None and plan.holding == "loaded":
        return "holds a loaded weight, which is for a model without backward, but got a gradient sink"
    if arrived is not None and plan.holding != "resident":
        return f"waits for rows from other ranks, but they send rows of resident weights, not {plan.holding}"
    return None


def slots_by_use(
    name: str, plan: Fp8Plan | None, state: ScaleState | None, *, record: bool
) -> dict[str, ScaleSlot]:
    """``{use: slot}`` of the delayed casts of the linear of this name; ``record``: with running maxima.

    ``AssertionError`` if there are delayed casts and no state, or the other way round.
    """
    names = [] if plan is None else list(scale_slots(name, plan))
    assert state is not None or not names, f"{name} has delayed scales but no scale state"
    assert state is None or names, f"{name} has a scale state but no delayed scales"
    if state is None:
        return {}
    return {slot.removeprefix(f"{name}/"): state.slot(slot, record=record) for slot in names}


def cast_slots(slots: Mapping[str, ScaleSlot]) -> CastSlots:
    """The slots that forward and backward use, from ``{use: slot}`` of all."""
    fields = {use.replace(".", "_"): slot for use, slot in slots.items()}
    return CastSlots(**{name: slot for name, slot in fields.items() if name in CastSlots._fields})
