"""The worst cast is named."""

from __future__ import annotations

import math

from fp8train.live.fp8_health import worst_casts


def test_the_worst_casts_are_named_and_healthy_ones_are_not() -> None:
    healthy = {"amax": 1.0, "saturated": 1e-3, "flushed": 0.1}
    assert worst_casts({"a/x": healthy, "b/x": healthy}) == {}
    rows = {
        "a/x": healthy | {"saturated": 2e-3},
        "b/grad_output": healthy | {"saturated": 0.5, "flushed": 0.2},
        "c/w": healthy | {"amax": math.inf},
        "d/x": healthy | {"amax": math.nan},
    }
    assert worst_casts(rows) == {
        "saturated": {"site": "b/grad_output", "value": 0.5, "casts": 2},
        "flushed": {"site": "b/grad_output", "value": 0.2, "casts": 1},
        "non_finite": 2,
        "sites": ["c/w", "d/x"],
    }
