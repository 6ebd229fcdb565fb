"""Carries out the FP8 plan: every linear of a model is connected here, once, for training or for inference.

In two moves, because others stand between them. :func:`make_fp8_parts` makes what casts need: the state of
delayed scales, and the FP8 copies of weights. Training makes the gradient store and ZeRO's gather of weights,
which writes into those copies. Then :func:`connect_linears` hands each linear its share of all of it
(:meth:`fp8train.layers.linear.Linear.connect`), and blocks are compiled. Weights are written after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from fp8train.layers.fp8_weight import Fp8Weight, LoadedFp8Weight, ResidentFp8Weight
from fp8train.layers.linear import SinkSlot
from fp8train.layers.linear_plan import scale_slots
from fp8train.models.build import BuiltModel
from fp8train.models.fused_block import can_fuse
from fp8train.numerics.scale_state import ScaleState
from fp8train.numerics.statistics import CastRecorder


@dataclass(frozen=True)
class Fp8Parts:
    """What the casts of a model's linears need.

    Attributes:
        scales: state of all delayed scales; None if there are none.
        recorder: where cast statistics go; None keeps none.
        weights: FP8 copies by FQN of the weight, of the linears in the plan that this process holds; without
            those that every forward casts anew.
    """

    scales: ScaleState | None
    recorder: CastRecorder | None
    weights: Mapping[str, Fp8Weight]

    @property
    def resident(self) -> dict[str, ResidentFp8Weight]:
        """The weights that exist in FP8 alone and that the optimizer writes, by FQN."""
        return {fqn: weight for fqn, weight in self.weights.items() if isinstance(weight, ResidentFp8Weight)}

    @property
    def loaded(self) -> dict[str, LoadedFp8Weight]:
        """The weights that exist in FP8 alone and are read from a checkpoint, by FQN."""
        return {fqn: weight for fqn, weight in self.weights.items() if isinstance(weight, LoadedFp8Weight)}


def make_fp8_parts(built: BuiltModel, *, recorder: CastRecorder | None = None) -> Fp8Parts:
    """Allocate the delayed scales and FP8 weights that the plan asks for; empty without FP8.

    Args:
        built: the model, not connected yet.
        recorder: has the sites ``PATH/x``, ``PATH/w`` and ``PATH/grad_output`` of the linears in FP8.

    Raises:
        ValueError: a weight is to exist in FP8 alone under a plan that does not allow it.
    """
    if built.fp8 is None:
        return Fp8Parts(None, None, {})
    held = {path: linear for path, linear in built.model.linears().items() if path in built.fp8.plans}
    slots = {path: scale_slots(path, built.fp8.plans[path]) for path in held}
    delayed = {slot: spec for own in slots.values() for slot, spec in own.items()}
    state = ScaleState(delayed, next(built.model.parameters()).device) if delayed else None
    weights = {}
    for path, linear in held.items():
        own = state if slots[path] else None
        weight = linear.make_fp8_weight(built.fp8.plans[path], scale_state=own, recorder=recorder)
        if weight is not None:
            weights[f"{path}.weight"] = weight
    return Fp8Parts(state, recorder, weights)


def connect_linears(
    built: BuiltModel,
    parts: Fp8Parts,
    *,
    sink_slot: Callable[[str], SinkSlot] | None = None,
    arrived: Callable[[str], None] | None = None,
) -> None:
    """Connect every linear, in FP8 or not. Values of weights that exist in FP8 alone are dropped. If blocks
    are to be compiled, those are that do not run as fused functions, which leave a compiler nothing.

    Args:
        built: the model and its plan.
        parts: of the same model.
        sink_slot: gives a weight's place in the gradient store by its FQN; None leaves gradients to autograd.
        arrived: waits until all rows of a resident weight are here, by its FQN; None where one process writes
            them all.
    """
    resident = parts.resident
    for path, linear in built.model.linears().items():
        fqn = f"{path}.weight"
        plan = None if built.fp8 is None else built.fp8.plans.get(path)
        linear.connect(
            plan=plan,
            weight=parts.weights.get(fqn),
            scale_state=parts.scales if plan is not None and scale_slots(path, plan) else None,
            recorder=None if plan is None else parts.recorder,
            sink_slot=None if sink_slot is None or not linear.weight.requires_grad else sink_slot(fqn),
            arrived=None if arrived is None or fqn not in resident else partial(arrived, fqn),
            native=built.fp8 is not None and path in built.fp8.native,
        )
    for block in built.model.held_blocks() if built.compiles else ():
        if not can_fuse(block):
            block.compile(fullgraph=True)
