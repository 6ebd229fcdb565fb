"""The cast log as arrays: [steps, layers] per (operand, linear type)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fp8train.reporting.cast_log import CastSample

OPERANDS = {
    "x": "activation",
    "w": "weight",
    "grad_output": "output gradient",
    "grad_weight": "weight gradient",
}
"""Operand of the log -> what people call it, in the order of the plots."""
LINEARS = ("qkv", "out", "up", "down")
FIELDS = ("log2_scale", "flushed", "saturated", "amax", "rms", "snr_db", "kurtosis")


@dataclass(frozen=True)
class Series:
    """The statistics of one operand of one linear type, over steps and layers.

    Attributes:
        operand: key of :data:`OPERANDS`.
        linear: linear type.
        steps: sampled steps, ascending.
        layers: block indices, ascending.
        fields: ``{field: float64 [steps, layers]}`` of :data:`FIELDS`; NaN where there is no number.
    """

    operand: str
    linear: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    fields: Mapping[str, np.ndarray]

    def at(self, step: int, field: str) -> np.ndarray:
        """Finite values of ``field`` at ``step``, over layers."""
        row = self.fields[field][self.steps.index(step)]
        return row[np.isfinite(row)]


def series_of(samples: Iterable[CastSample]) -> list[Series]:
    """Arrays of every (operand, linear), in the order of the plots."""
    groups: dict[tuple[str, str], list[CastSample]] = {}
    for sample in samples:
        groups.setdefault((sample.operand, sample.linear), []).append(sample)
    found = []
    for operand, linear in sorted(groups, key=lambda key: (_rank(OPERANDS, key[0]), _rank(LINEARS, key[1]))):
        members = groups[operand, linear]
        steps = sorted({sample.step for sample in members})
        layers = sorted({sample.layer for sample in members})
        fields = {name: np.full((len(steps), len(layers)), np.nan) for name in FIELDS}
        for sample in members:
            where = steps.index(sample.step), layers.index(sample.layer)
            for name in FIELDS:
                fields[name][where] = sample.values.get(name, math.nan)
        found.append(Series(operand, linear, tuple(steps), tuple(layers), fields))
    return found


def _rank(known: Iterable[str], name: str) -> tuple[int, str]:
    names = list(known)
    return (names.index(name) if name in names else len(names), name)


def moments(series: Sequence[Series]) -> dict[str, int]:
    """``{start, middle, end: step}`` of the sampled steps; fewer where fewer were sampled."""
    steps = sorted({step for one in series for step in one.steps})
    middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    named = {"start": steps[0], "middle": middle, "end": steps[-1]}
    return {name: step for i, (name, step) in enumerate(named.items()) if step not in [*named.values()][:i]}
