"""What the optimizer reads, and what it makes of it, against FP64 truths from outside.

Every other test of layouts compares two of our own paths, which may share a fault: gradients that are twice
too large everywhere are equal everywhere. See :mod:`tests.truth.scenario` for what is compared.
"""

from __future__ import annotations

import pytest

from tests.truth.cases import CASES, MORE, SHORT, problems_of

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = 40
LONG = (
    *("O2, 8 micro-batches", "O2, 4 ranks", "O3, rows", "paper, 2 ranks", "exact, 8 micro-batches"),
    *("exact, rows, 2 ranks", "feedback, rows, 2 ranks"),
)
"""All steps in every run; the others see the first of them, and all when asked for slow tests."""


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, ALL if name in LONG else SHORT) for name in CASES),
        *(pytest.param(name, ALL, marks=pytest.mark.slow) for name in CASES if name not in LONG),
    ],
)
def test_the_optimizer_reads_the_true_gradient(gloo_pool, name: str, steps: int) -> None:
    found = problems_of(gloo_pool, CASES[name], steps)
    assert not found, f"{len(found)} problems\n" + "\n".join(found[:12])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_under_every_recipe(gloo_pool, name: str) -> None:
    found = problems_of(gloo_pool, MORE[name], SHORT)
    assert not found, f"{len(found)} problems\n" + "\n".join(found[:12])
