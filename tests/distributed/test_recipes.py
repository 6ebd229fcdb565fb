"""Every recipe of scales on every kind of layout: the same training as one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, joined_processes
from tests.distributed.test_tensor_parallel import WIDE
from tests.training.tiny import alone, losses, tiny_config

RECIPES = (
    *("current", "te_current", "te_delayed", "te_delayed_recent"),
    *("mse", "cscale", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8"),
    *("nvfp4_simulated", "coat_act"),
    *("mus", "umup", "unit_scaling"),
)
"""``fp8_amax`` is ``current`` by another name (tests/config/test_presets.py)."""
IN_CI = ("te_delayed", "mus")
LONG = ["data.seq_length=256"]
BLOCKS: dict[str, list[str]] = {
    # Blocks of 32 tokens and features survive every cut; of 128, with more tokens and wider matrices.
    "mxfp8": ["data.seq_length=64"],
    "nvfp4_simulated": ["data.seq_length=32"],
    "blockwise": [*LONG, "train.global_batch_size=4", "train.micro_batch_size=1"],
}
"""Settings that leave blocks whole."""
STEPS = 4
RATES = {"umup": ["optimizer.lr=0.5"]}
"""Rates that a recipe needs where the tests' usual one is too small."""
EXACT = ["precision.gradient.fp8.reduce=exact", "run.threads=1", "model.tie_embeddings=false"]
FP64 = ["precision.compute=fp64", "precision.gemm.fp8=true"]
FP8_WIRE = ["precision.traffic.activations=fp8", "precision.traffic.grad_output=fp8"]
LAYOUTS: dict[str, tuple[Layout, list[str], list[str]]] = {
    "dp2": (Layout(), ["precision.level=O2", *EXACT], []),
    "dp2-zero": (Layout(), ["precision.level=O3", *EXACT], ["parallel.zero=1"]),
    "pp2": (Layout(pp=2), ["precision.level=O2", *EXACT], ["parallel.pp=2"]),
    "tp2": (Layout(tp=2), FP64, ["parallel.tp=2"]),
    "tp2-fp8-wire": (Layout(tp=2), FP64, ["parallel.tp=2", *FP8_WIRE]),
    "cp2": (Layout(cp=2), FP64, ["parallel.cp=2"]),
}


def settings(recipe: str, layout: str) -> tuple[list[str], list[str]]:
    """(overrides of one process, those that the layout adds)."""
    _, overrides, more = LAYOUTS[layout]
    own = [*BLOCKS.get(recipe, []), *RATES.get(recipe, [])]
    return [f"precision.recipe={recipe}", *overrides, *own], more


def layouts(recipe: str) -> list[str]:
    """Those that the recipe allows: unquantised and simulated operands do not travel as codes."""
    without_codes = recipe in ("rowwise_gw_hp", "nvfp4_simulated")
    return [name for name in LAYOUTS if not (without_codes and name == "tp2-fp8-wire")]


def recipe_losses(
    group: dist.ProcessGroup, rank: int, world_size: int, recipe: str
) -> dict[str, list[float]]:
    """Runs in the pool: losses on every layout."""
    found = {}
    for name in layouts(recipe):
        processes = joined_processes(torch.device("cpu"), LAYOUTS[name][0])
        overrides, more = settings(recipe, name)
        config = tiny_config([*overrides, *more], **WIDE)
        found[name] = losses(config, processes, STEPS)[0]
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "recipe",
    [*IN_CI, *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name not in IN_CI)],
)
def test_a_recipe_trains_as_one_process_does(gloo_pool, recipe: str) -> None:
    per_rank = gloo_pool.run(recipe_losses, 2, recipe, timeout=300.0)
    for name in layouts(recipe):
        overrides, _ = settings(recipe, name)
        alone_config = tiny_config([*overrides, "parallel.zero=none"], **WIDE)
        expected, trainer = losses(alone_config, alone(), STEPS)
        assert (trainer.scales is not None) == ("delayed" in recipe)
        assert expected[-1] < expected[0], f"{name}: {expected}"
        for found in per_rank:
            tolerance = 1e-12 if FP64[0] in overrides else 0.0
            assert found[name] == pytest.approx(expected, rel=tolerance, abs=0.0), name
