"""A sample of the layouts that ``tools/layouts.py`` runs as a whole: losses and the first step's codes."""

from __future__ import annotations

from typing import Any

import pytest

from tools.layouts import FACTORS, compare, covering_array, legal

ONE: dict[str, Any] = {
    **{name: values[0] for name, values in FACTORS.items()},
    "compute": "bf16",
    "level": "O1",
    "reduce": "exchange",
}
STEPS = 2
CASES: dict[str, dict[str, Any]] = {
    # No sum is made in parts: the codes of one process.
    "dp": {"dp": 2, "level": "O2"},
    "zero": {"dp": 2, "zero": "rows", "level": "O3", "model": "llama-untied"},
    "pp": {"pp": 2, "schedule": "zbv", "recompute": "full", "model": "gpt-untied"},
    "cp": {"cp": 2, "zero": "whole_tensor", "level": "O3", "model": "llama-tied"},
    # Sums of parts: the codes of one process that rounds as the ranks do.
    "tp": {"tp": 2, "level": "O3", "model": "llama-untied", "recompute": "selective"},
    "tp4": {"tp": 4, "level": "O2", "model": "gpt-tied"},
    # ... or of any process, where nothing is rounded.
    "tp-fp64": {"tp": 2, "level": "O2", "compute": "fp64", "model": "llama-tied", "reduce": "exact"},
    "all": {"tp": 2, "pp": 2, "dp": 2, "zero": "rows", "level": "O3", "schedule": "interleaved_1f1b"},
}

SLOW = ("tp4", "tp-fp64")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_a_layout_trains_as_one_process_does(gloo_pool, name: str) -> None:
    case = ONE | CASES[name]
    assert legal(case)
    result = compare(case, gloo_pool, STEPS)
    assert result["codes_rounded_alike"]["w"] == 0.0, "no FP8 weight was compared"
    assert result["ok"], result


def test_the_array_holds_every_value() -> None:
    array = covering_array()
    assert all(legal(one) for one in array)
    for name, values in FACTORS.items():
        assert {one[name] for one in array} == set(values)
    assert len(array) <= 200
