"""Every recipe of scales on every kind of layout: the same training as one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, joined_processes
from tests.distributed.test_tensor_parallel import WIDE
from tests.training.tiny import alone, losses, tiny_config

IN_CI = ("te_delayed", "mus")
RECIPES = (*IN_CI, "current", "te_current", "te_delayed_recent", "umup", "unit_scaling")
"""``fp8_amax`` is ``current`` by another name (tests/config/test_presets.py)."""
STEPS = 4
RATES = {"umup": ["optimizer.lr=0.5"]}
"""Rates that a recipe needs where the tests' usual one is too small."""
EXACT = ["precision.gradient.fp8.reduce=exact", "run.threads=1", "model.tie_embeddings=false"]
FP64 = ["precision.compute=fp64", "precision.gemm.fp8=true"]
LAYOUTS: dict[str, tuple[Layout, list[str], list[str]]] = {
    "dp2": (Layout(), ["precision.level=O2", *EXACT], []),
    "dp2-zero": (Layout(), ["precision.level=O3", *EXACT], ["parallel.zero=1"]),
    "pp2": (Layout(pp=2), ["precision.level=O2", *EXACT], ["parallel.pp=2"]),
    "tp2": (Layout(tp=2), FP64, ["parallel.tp=2"]),
    "cp2": (Layout(cp=2), FP64, ["parallel.cp=2"]),
}


def _recipe(name: str) -> list[str]:
    return [f"precision.recipe={name}", *RATES.get(name, [])]


def recipe_losses(
    group: dist.ProcessGroup, rank: int, world_size: int, recipe: str
) -> dict[str, list[float]]:
    """Runs in the pool: losses on every layout."""
    found = {}
    for name, (layout, overrides, more) in LAYOUTS.items():
        processes = joined_processes(torch.device("cpu"), layout)
        config = tiny_config([*_recipe(recipe), *overrides, *more], **WIDE)
        found[name] = losses(config, processes, STEPS)[0]
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in RECIPES],
)
def test_a_recipe_trains_as_one_process_does(gloo_pool, recipe: str) -> None:
    per_rank = gloo_pool.run(recipe_losses, 2, recipe, timeout=300.0)
    for name, (_, overrides, _) in LAYOUTS.items():
        alone_config = tiny_config([*_recipe(recipe), *overrides, "parallel.zero=none"], **WIDE)
        expected, trainer = losses(alone_config, alone(), STEPS)
        assert (trainer.scales is not None) == ("delayed" in recipe)
        assert expected[-1] < expected[0], f"{name}: {expected}"
        for found in per_rank:
            tolerance = 1e-12 if "fp64" in overrides[0] else 0.0
            assert found[name] == pytest.approx(expected, rel=tolerance, abs=0.0), name
