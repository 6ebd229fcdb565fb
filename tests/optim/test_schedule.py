"""Schedules against their closed forms."""

from __future__ import annotations

import itertools
import math

import pytest

from fp8train.config.optimizer_schema import ScheduleConfig
from fp8train.optim.schedule import lr_factor, warmup_steps


def curve(total: int, **settings) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [lr_factor(schedule, step, total) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert curve(100, kind="constant", warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_steps(ScheduleConfig(warmup_fraction=0.1), 50) == 5


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_ends_at_the_minimum(kind: str) -> None:
    factors = curve(50, kind=kind, warmup_steps=5, min_lr_ratio=0.1)
    assert factors[-1] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(factors[5:]))


def test_cosine_and_linear_midpoints() -> None:
    assert curve(100, kind="cosine", min_lr_ratio=0.0)[49] == pytest.approx(0.5)
    assert curve(100, kind="linear", min_lr_ratio=0.2)[49] == pytest.approx(0.6)
    assert curve(100, kind="cosine", min_lr_ratio=0.0)[24] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_then_linear() -> None:
    factors = curve(100, kind="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.0)
    assert factors[10:80] == [1.0] * 70
    assert factors[80] == pytest.approx(0.95)
    assert factors[89] == pytest.approx(0.5)
