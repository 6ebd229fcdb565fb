"""Connects linears of tests as :mod:`fp8train.models.connect` connects those of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.layers.fp8_weight import Fp8Weight, ResidentFp8Weight
from fp8train.layers.linear import Fp8Plan, Linear, SinkSlot
from fp8train.layers.linear_plan import Holding, scale_slots
from fp8train.numerics.scale_state import ScaleState
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant

CPU = torch.device("cpu")


def plan_of(quant: LinearQuant, dtype: torch.dtype, holding: Holding = "cached") -> Fp8Plan:
    """A plan for this machine."""
    return Fp8Plan(quant, choose_gemm_backend(CPU, dtype, quant), holding)


def state_of(quants: Mapping[str, LinearQuant]) -> ScaleState:
    """The scale state of linears of these names."""
    plans = {name: plan_of(quant, torch.float32) for name, quant in quants.items()}
    return ScaleState({k: v for name, plan in plans.items() for k, v in scale_slots(name, plan).items()}, CPU)


def connect(
    layer: Linear,
    quant: LinearQuant,
    *,
    holding: Holding = "cached",
    scale_state: ScaleState | None = None,
    recorder: CastRecorder | None = None,
    sink_slot: SinkSlot | None = None,
) -> Fp8Weight | None:
    """Run ``layer`` in FP8; returns its FP8 weight."""
    plan = plan_of(quant, layer.weight.dtype, holding)
    made = layer.make_fp8_weight(plan, scale_state=scale_state, recorder=recorder)
    layer.connect(plan=plan, weight=made, scale_state=scale_state, recorder=recorder, sink_slot=sink_slot)
    return made


def connect_resident(
    layer: Linear,
    quant: LinearQuant,
    *,
    scale_state: ScaleState | None = None,
    recorder: CastRecorder | None = None,
    sink_slot: SinkSlot | None = None,
) -> ResidentFp8Weight:
    """The same with a weight that exists in FP8 alone; returns what writes it."""
    made = connect(
        layer, quant, holding="resident", scale_state=scale_state, recorder=recorder, sink_slot=sink_slot
    )
    assert isinstance(made, ResidentFp8Weight)
    return made
