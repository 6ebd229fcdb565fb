"""State formats that make no sense are refused with the key, the value and a remedy."""

from __future__ import annotations

from typing import Any

import pytest

from fp8train.precision.problems import PrecisionError
from fp8train.precision.state_formats import StateFormat, StateFormats

F = StateFormat
TENSOR = {"format": "e4m3", "granularity": "tensor"}


@pytest.mark.parametrize(
    ("role", "fields", "key", "remedy"),
    [
        ("exp_avg", {"format": "fp8"}, "format: 'fp8'", "e4m3, e5m2"),
        ("exp_avg", {"format": "bf16_remainder"}, "format: bf16_remainder", "write fp32"),
        ("exp_avg_sq", {"format": "bf16_remainder"}, "format: bf16_remainder", "write fp32"),
        ("master", {"granularity": "tensor"}, "granularity: tensor", "format: fp16_scaled or e4m3 or e5m2"),
        ("master", {"format": "e4m3", "granularity": "row"}, "granularity: 'row'", "tensor, block"),
        ("master", {"format": "e4m3", "block": 256}, "block: 256", "1 to 128"),
        ("master", {"format": "bf16", "block": 64}, "block: 64", "remove it"),
        ("exp_avg", {**TENSOR, "block": 64}, "block: 64", "granularity: block"),
        ("exp_avg", {"format": "fp16_scaled", "expand": True}, "expand: true", "e4m3 or e5m2"),
        ("exp_avg", {**TENSOR, "expand": True}, "expand: true", "granularity: block"),
        ("exp_avg", {"format": "e4m3", "sqrt": True}, "sqrt: true", "second moment"),
        ("exp_avg_sq", {"sqrt": True}, "sqrt: true", "bf16 or"),
        ("master", {"rounding": "stochastic"}, "rounding: stochastic", "remove it"),
        ("master", {"format": "bf16_remainder", "rounding": "stochastic"}, "rounding: st", "remove it"),
        ("master", {"format": "bf16", "rounding": "up"}, "rounding: 'up'", "nearest, stochastic"),
    ],
)
def test_refused(role: str, fields: dict[str, Any], key: str, remedy: str) -> None:
    with pytest.raises(PrecisionError) as error:
        StateFormats(**{role: StateFormat(**fields)})
    (problem,) = error.value.problems
    assert problem.message.startswith(key)
    assert remedy in problem.message
    assert problem.keys[0].rpartition(".")[2] == key.partition(":")[0]


def test_the_wrong_role_is_named_and_all_are_told() -> None:
    with pytest.raises(PrecisionError) as error:
        StateFormats(F("e4m3", sqrt=True), F("bf16_remainder"))
    assert [problem.keys for problem in error.value.problems] == [
        ("master.sqrt",),
        ("exp_avg.format",),
    ]


def test_every_useful_combination_is_legal() -> None:
    count = 0
    for name in ("fp16_scaled", "e4m3", "e5m2"):
        for granularity in ("tensor", "block"):
            for rounding in ("nearest", "stochastic"):
                fmt = F(name, granularity=granularity, rounding=rounding)  # type: ignore[arg-type]
                root = F(name, granularity=granularity, rounding=rounding, sqrt=True)  # type: ignore[arg-type]
                StateFormats(fmt, fmt, fmt)
                StateFormats(exp_avg_sq=root)
                count += 1
    assert count == 12
    StateFormats(F("bf16_remainder"), F("e5m2", expand=True, block=32), F("e4m3", expand=True, sqrt=True))


def test_a_plan_prints_what_it_stores() -> None:
    plan = StateFormats(
        F("fp16_scaled", rounding="stochastic"), F("e4m3", granularity="tensor"), F("e5m2", sqrt=True)
    )
    assert str(plan) == (
        "master=fp16_scaled/block128/stochastic exp_avg=e4m3/tensor exp_avg_sq=sqrt(e5m2)/block128"
    )
