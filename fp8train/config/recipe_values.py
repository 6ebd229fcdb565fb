"""What recipes are made of: settings of operands, for all six at once or by name.

A recipe (:mod:`fp8train.config.recipes`) is data, not code: a table of dotted keys that
:mod:`fp8train.config.presets` lays under what a person writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp8train.config.nodes import Scalar

Values = dict[str, Scalar | tuple[str, ...]]
"""Dotted keys and what they are filled with."""


@dataclass(frozen=True)
class Recipe:
    """One value of ``precision.recipe``.

    Attributes:
        summary: how it chooses scales, half a sentence for the reference of settings.
        values: what it fills: how the six operands of the GEMMs are cast, and where its scales demand it what
            is kept of them and how weights are stored. A static one names the parametrisation that it needs.
    """

    summary: str
    values: Values

    @property
    def is_static(self) -> bool:
        """Whether it casts without scales, and so needs a parametrisation of its own."""
        return "parametrization.kind" in self.values


GEMM_OPERANDS: dict[str, str] = {
    "output.x": "e4m3",
    "output.w": "e4m3",
    "grad_input.grad_output": "e5m2",
    "grad_input.w": "e4m3",
    "grad_weight.grad_output": "e5m2",
    "grad_weight.x": "e4m3",
}
"""The six operand uses and their usual formats: E5M2's range for gradients, E4M3's precision for the rest
(FP8-LM A.1)."""


def same_for_all_operands(settings: Values, number_format: str | None = None) -> Values:
    """``settings`` for every operand use, each with its usual format unless there is one for all."""
    filled: dict[str, Scalar | tuple[str, ...]] = {}
    for operand, usual in GEMM_OPERANDS.items():
        filled[f"precision.gemm.{operand}.format"] = number_format or usual
        filled |= {f"precision.gemm.{operand}.{key}": value for key, value in settings.items()}
    return filled


CURRENT: Values = {
    "granularity": "tensor",
    "scale_source": "current",
    "power_of_two": True,
    "margin": 0,
    "rounding": "nearest",
}
UNSCALED: Values = {**CURRENT, "scale_source": "constant", "constant_exponent": 0}
FP32_SCALES: Values = {**CURRENT, "power_of_two": False}
DELAYED: Values = {**FP32_SCALES, "scale_source": "delayed"}


def operands(settings: Mapping[str, Values]) -> Values:
    """``{operand use or last part of its name: settings}`` as dotted keys."""
    return {
        f"precision.gemm.{use}.{key}": value
        for use in GEMM_OPERANDS
        for name, values in settings.items()
        if name in (use, use.rpartition(".")[2])
        for key, value in values.items()
    }


def constant(exponent: int) -> Values:
    """A scale of ``2^exponent``."""
    return {"scale_source": "constant", "constant_exponent": exponent}


COMPUTE_WEIGHTS: Values = {"precision.weights": "compute", "precision.traffic.weights": "compute"}
"""For scales that the optimizer cannot know before it writes a weight's first piece."""
DIRECTED_OPERANDS: Values = {"precision.gemm.keep_x": "second_copy", **COMPUTE_WEIGHTS}
"""Scales along the contracted dimension: x is cast for each of its two GEMMs."""
