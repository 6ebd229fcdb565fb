"""Gradient settings: what is refused, and under which keys."""

from typing import Any

import pytest

from fp8train.precision.gradients import Fp8Gradients, Gradients
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.problems import PrecisionError

SHARED = {"reduce": "shared_scale"}


@pytest.mark.parametrize(
    ("settings", "keys", "message"),
    [
        (
            {"sum": "tree"},
            "sum reduce",
            "sum: tree is read with reduce: shared_scale, but reduce is exchange",
        ),
        ({"mu_window": 5}, "mu_window reduce", "mu_window: 5 is read with reduce: shared_scale"),
        (
            {**SHARED, "node_size": 2},
            "node_size reduce",
            "2 is read with reduce: exchange, but reduce is shared",
        ),
        (
            {"reduce": "exact", "error_feedback": True},
            "error_feedback reduce",
            "true is read with reduce: exchange",
        ),
        ({"accumulate": "fp8"}, "accumulate reduce", "write accumulate: bf16"),
        ({"block": 16}, "block", "block: 16 elements; legal: 32 to 128"),
        ({**SHARED, "mu_threshold": 0.0}, "mu_threshold", "mu_threshold: 0; legal: between 0 and 1"),
        ({**SHARED, "mu_window": 0}, "mu_window", "mu_window: 0 steps; legal: 1 or more"),
        ({**SHARED, "mu_criterion": "energy"}, "mu_criterion", "'energy'; legal: count, any"),
        ({"reduce": "sum"}, "reduce", "'sum'; legal: exchange, shared_scale, exact, bf16, fp32"),
    ],
)
def test_refused(settings: dict[str, Any], keys: str, message: str) -> None:
    with pytest.raises(PrecisionError, match=message) as caught:
        Fp8Gradients(**settings)
    assert [problem.keys for problem in caught.value.problems] == [tuple(keys.split())]


def test_exact_counts_in_units_of_e4m3() -> None:
    exact = Fp8Gradients(reduce="exact")
    assert Gradients(format=E4M3, fp8=exact).fp8 is exact
    with pytest.raises(PrecisionError, match="write format: e4m3") as caught:
        Gradients(format=E5M2, fp8=exact)
    assert caught.value.problems[0].keys == ("format", "fp8.reduce")
