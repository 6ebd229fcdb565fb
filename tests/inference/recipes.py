"""Recipes whose checkpoints are tested: all there are, a few of them in every test run."""

import pytest

from fp8train.config.recipe_registry import RECIPES as RECIPE_TABLES

STATIC = {"mus": 0.06, "unit_scaling": 0.1, "umup": 0.5}
"""With their learning rates: weights have unit variance."""

RECIPES: dict[str, tuple[str, ...]] = {
    name: (f"precision.recipe={name}",) for name in RECIPE_TABLES if name not in STATIC
} | {
    "paper": ("precision.profile=paper",),
    **{name: (f"precision.recipe={name}", f"optimizer.lr={lr}") for name, lr in STATIC.items()},
}

IN_CI = ("current", "te_current", "te_delayed", "rowwise", "mus")
"""One of each kind of scale; the others are marked slow."""

MARKED = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in RECIPES]
