"""Small configurations that together cover levels, recipes, reductions, micro-batches, ranks and ZeRO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fp8train.comm.processes import joined_processes
from fp8train.config.schema import Config
from tests.training.tiny import alone, tiny_config
from tests.truth.events import BAD_FIRST, GENTLE, MILLION, WILD, ZERO_FIRST, Event
from tests.truth.floors import problems
from tests.truth.scenario import Run, play

SHORT = 18
"""Steps of a quick run."""
STATIC = ("mus", "unit_scaling", "umup")


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        ranks: data-parallel ones.
        accumulation: micro-batches of a rank.
        overrides: settings.
        events: what happens.
    """

    overrides: tuple[str, ...]
    ranks: int = 1
    accumulation: int = 1
    events: tuple[Event, ...] = WILD

    def config(self) -> Config:
        sizes = [f"train.global_batch_size={max(4, self.ranks * self.accumulation)}", "train.steps=40"]
        micro = max(4, self.ranks * self.accumulation) // (self.ranks * self.accumulation)
        return tiny_config([*sizes, f"train.micro_batch_size={micro}", "run.threads=1", *self.overrides])

    @property
    def is_llama(self) -> bool:
        """Whether the independent Llama is this case's truth."""
        return not any(f"precision.recipe={name}" in self.overrides for name in STATIC)


def _level(level: str, *overrides: str, **settings) -> Case:
    return Case((f"precision.level={level}", *overrides), **settings)


def _fp8(*settings: str) -> tuple[str, ...]:
    return tuple(f"precision.gradient.fp8.{setting}" for setting in settings)


EXACT = _fp8("reduce=exact")
FEEDBACK = _fp8("error_feedback=true")

CASES: dict[str, Case] = {
    "O0, 8 micro-batches": _level("O0", accumulation=8),
    "O0 in FP64, 2 ranks": _level("O0", "precision.compute=fp64", ranks=2),
    "O0, BF16 sums, 4 ranks": _level(
        "O0", "precision.gradient.accumulate=bf16", "precision.gradient.reduce=bf16", ranks=4, accumulation=2
    ),
    "O0, ZeRO, 2 ranks": _level("O0", "parallel.zero=1", ranks=2, accumulation=3),
    "O1, 2 ranks": _level("O1", ranks=2, accumulation=3),
    "O1 to FP32 states, high-precision gradients": _level(
        "O0", "precision.gemm.fp8=true", ranks=2, accumulation=1
    ),
    "O2, 8 micro-batches": _level("O2", accumulation=8),
    "O2, 4 ranks": _level("O2", ranks=4),
    "O2, nodes of 2": _level("O2", *_fp8("node_size=2"), ranks=4),
    "O2, nodes of 2, BF16 between": _level("O2", *_fp8("node_size=2", "between_nodes=bf16"), ranks=4),
    "O3, nodes of 2, rows": _level("O3", *_fp8("node_size=2"), ranks=4),
    "O3, shared scale, rows": _level("O3", *_fp8("reduce=shared_scale"), ranks=2, accumulation=3),
    "O2, BF16 on the wire": _level("O2", *_fp8("reduce=bf16"), ranks=2, accumulation=3),
    "O2, FP32 on the wire": _level("O2", *_fp8("reduce=fp32", "accumulate=fp32"), ranks=2),
    "O2, shared scale": _level("O2", *_fp8("reduce=shared_scale"), ranks=4),
    "paper, 2 ranks": _level("O2", "precision.profile=paper", ranks=2, accumulation=3),
    "O3, rows": _level("O3", ranks=2, accumulation=3),
    "O3, whole tensors": _level("O3", "parallel.zero_partition=whole_tensor", ranks=4),
    "O2, Lion": _level("O2", "optimizer.name=lion", "optimizer.lr=0.002"),
    "O2, COAT's states": _level("O2", "precision.state.plan=coat"),
    "O2, E4M3 and E5M2 states": _level("O2", "precision.state.plan=e4m3_e5m2"),
    "O2, lean states": _level("O2", "precision.state.plan=lean"),
    "O2, tied": _level("O2", "model.tie_embeddings=true"),
    "exact, 8 micro-batches": _level("O2", *EXACT, accumulation=8),
    "exact, 2 ranks": _level("O2", *EXACT, ranks=2),
    "exact, rows, 2 ranks": _level("O3", *EXACT, ranks=2, accumulation=3),
    "exact, first batch without gradient": _level("O2", *EXACT, events=ZERO_FIRST),
    "exact, first batch not finite": _level("O2", *EXACT, ranks=2, events=BAD_FIRST),
    "feedback": _level("O2", *FEEDBACK, accumulation=3),
    "feedback, rows, 2 ranks": _level("O3", *FEEDBACK, ranks=2),
}

RECIPES = (
    *("current", "fp8_amax", "te_current", "te_delayed", "te_delayed_recent", "mse", "cscale"),
    *("rowwise", "rowwise_gw_hp", "blockwise", "mxfp8", "nvfp4_simulated", "coat_act", *STATIC),
)
RATES = {"mus": "optimizer.lr=0.03", "unit_scaling": "optimizer.lr=0.03", "umup": "optimizer.lr=0.5"}


def of_recipe(recipe: str, level: str = "O2", *overrides: str, **settings) -> Case:
    """A recipe with events that its scales can follow."""
    gentle = recipe in (*STATIC, "cscale") or "delayed" in recipe
    rates = [RATES[recipe]] if recipe in RATES else []
    return _level(
        level,
        f"precision.recipe={recipe}",
        *rates,
        *overrides,
        events=GENTLE if gentle else WILD,
        **settings,
    )


CASES |= {f"recipe {recipe}": of_recipe(recipe) for recipe in RECIPES}

MORE: dict[str, Case] = {
    f"{recipe}, {name}": of_recipe(recipe, level, *overrides, ranks=ranks, accumulation=accumulation)
    for recipe in RECIPES
    for name, level, overrides, ranks, accumulation in (
        ("O1, 2 ranks of 3", "O1", (), 2, 3),
        ("O3, 4 ranks", "O3", (), 4, 1),
        ("exact, 2 ranks", "O2", EXACT, 2, 2),
        ("shared scale, 2 ranks", "O2", _fp8("reduce=shared_scale"), 2, 3),
    )
}
"""Every recipe under the reductions and layouts that change what follows it."""

AFTER_A_MILLION = _level("O2", *EXACT, events=MILLION)


def play_case(group: dist.ProcessGroup | None, rank: int, world_size: int, case: Case, steps: int) -> Run:
    """Runs in the pool, or alone."""
    processes = alone() if group is None else joined_processes(torch.device("cpu"))
    return play(case.config(), processes, case.events[:steps], is_llama=case.is_llama)


def run_case(pool, case: Case, steps: int) -> Run:
    """The numbers of rank 0."""
    if case.ranks == 1:
        return play_case(None, 0, 1, case, steps)
    return pool.run(play_case, case.ranks, case, steps, timeout=240.0)[0]


def problems_of(pool, case: Case, steps: int) -> list[str]:
    """What is wrong with the case."""
    return problems(case.config(), run_case(pool, case, steps), ranks=case.ranks)
