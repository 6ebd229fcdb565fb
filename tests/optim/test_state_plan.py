"""State formats that make no sense are refused with the key, the value and a remedy."""

from __future__ import annotations

import pytest

from fp8train.optim.state_plan import StateFormat, StatePlan

F = StateFormat


@pytest.mark.parametrize(
    ("role", "fmt", "key", "remedy"),
    [
        ("exp_avg", F("fp8"), "format: 'fp8'", "e4m3, e5m2"),  # type: ignore[arg-type]
        ("exp_avg", F("bf16_remainder"), "format: bf16_remainder", "write fp32"),
        ("exp_avg_sq", F("bf16_remainder"), "format: bf16_remainder", "write fp32"),
        ("master", F("fp32", granularity="tensor"), "granularity: tensor", "has no scale"),
        ("master", F("e4m3", granularity="row"), "granularity: 'row'", "tensor, block"),  # type: ignore[arg-type]
        ("master", F("e4m3", block=16), "block: 16", "32 to 128"),
        ("master", F("e4m3", block=256), "block: 256", "32 to 128"),
        ("master", F("bf16", block=64), "block: 64", "no block scales"),
        ("exp_avg", F("e4m3", granularity="tensor", block=64), "block: 64", "granularity: block"),
        ("exp_avg", F("fp16_scaled", expand=True), "expand: true", "e4m3 or e5m2"),
        ("exp_avg", F("e4m3", granularity="tensor", expand=True), "expand: true", "granularity: block"),
        ("exp_avg", F("e4m3", sqrt=True), "sqrt: true", "second moment"),
        ("exp_avg_sq", F("fp32", sqrt=True), "sqrt: true", "leave it out"),
        ("master", F("fp32", rounding="stochastic"), "rounding: stochastic", "write nearest"),
        ("master", F("bf16_remainder", rounding="stochastic"), "rounding: stochastic", "write nearest"),
        ("master", F("bf16", rounding="up"), "rounding: 'up'", "nearest, stochastic"),  # type: ignore[arg-type]
    ],
)
def test_refused(role: str, fmt: StateFormat, key: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        StatePlan(**{role: fmt})
    message = str(error.value)
    assert message.startswith(f"precision.state.{role}.{key}")
    assert remedy in message


def test_every_useful_combination_is_legal() -> None:
    count = 0
    for name in ("fp16_scaled", "e4m3", "e5m2"):
        for granularity in ("tensor", "block"):
            for rounding in ("nearest", "stochastic"):
                fmt = F(name, granularity=granularity, rounding=rounding)  # type: ignore[arg-type]
                root = F(name, granularity=granularity, rounding=rounding, sqrt=True)  # type: ignore[arg-type]
                StatePlan(fmt, fmt, fmt)
                StatePlan(exp_avg_sq=root)
                count += 1
    assert count == 12
    StatePlan(F("bf16_remainder"), F("e5m2", expand=True, block=32), F("e4m3", expand=True, sqrt=True))


def test_a_plan_prints_what_it_stores() -> None:
    plan = StatePlan(
        F("fp16_scaled", rounding="stochastic"), F("e4m3", granularity="tensor"), F("e5m2", sqrt=True)
    )
    assert str(plan) == (
        "master=fp16_scaled/block128/stochastic exp_avg=e4m3/tensor exp_avg_sq=sqrt(e5m2)/block128"
    )
