"""The table of legal and refused recipes, levels and layouts: what it says is so, and what is legal trains.

That layouts train as one process does is in ``test_recipes.py`` and ``test_layouts.py``.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.keys import key_table
from fp8train.config.schema import Config
from fp8train.step.trainer import Trainer
from tests.distributed.test_recipes import BLOCKS, RATES
from tests.distributed.test_tensor_parallel import WIDE
from tests.training.tiny import VOCAB, alone, batches, tiny_config
from tools.recipe_cases import LAYOUTS, LEVELS, RECIPES, Case, Tables, all_cases, all_refusals
from tools.recipe_layouts import MARKER, level_range, render

PAGE = Path(__file__).resolve().parents[2] / "docs/recipe_layouts.md"
STEPS = 2
BRIEF = ["train.global_batch_size=2", "schedule.kind=constant"]


def tiny(case: Case) -> Config:
    """The case on the tests' model, with what its recipe needs there."""
    own = [*BLOCKS.get(case.recipe, []), *RATES.get(case.recipe, [])]
    return tiny_config([*case.overrides, *own, *BRIEF], **WIDE)


def legal_on_the_tiny_model() -> list[Case]:
    """What is legal on sizes that leave every recipe's blocks whole."""
    legal = []
    for case in all_cases():
        try:
            tiny(case)
        except ConfigError:
            continue
        legal.append(case)
    return legal


def pairs(case: Case) -> list[tuple[str, str]]:
    """Every two values of a case; no value is in two factors."""
    return list(itertools.combinations((case.recipe, case.level, case.layout), 2))


def covering(legal: list[Case]) -> list[Case]:
    """Cases that hold every legal pair of recipe, level and layout, few of them: first the one of each recipe
    and layout whose level follows from both, then what is missing."""
    turn = {
        (recipe, layout): LEVELS[(i + j) % len(LEVELS)]
        for (i, recipe), (j, layout) in itertools.product(enumerate(RECIPES), enumerate(LAYOUTS))
    }
    first = [case for case in legal if turn[case.recipe, case.layout] == case.level]
    missing = {pair for case in legal for pair in pairs(case)} - {
        pair for case in first for pair in pairs(case)
    }
    for case in legal:
        if missing.intersection(pairs(case)):
            first.append(case)
            missing.difference_update(pairs(case))
    return first


def train_cases(
    group: dist.ProcessGroup | None, rank: int, world_size: int, layout: Layout, cases: list[Case]
) -> list[list[float]]:
    """Runs in the pool: losses of each on one batch, again and again."""
    processes = alone() if world_size == 1 else joined_processes(torch.device("cpu"), layout)
    found = []
    for case in cases:
        config = tiny(case)
        trainer, tokens = Trainer(config, processes, vocab_size=VOCAB), batches(config, processes).batch(0)
        found.append([float(trainer.step(i, tokens).loss) for i in range(STEPS)])
    return found


def check(cases: list[Case], gloo_pool) -> None:
    """All of them train: finite losses that fall, the same on all ranks."""
    for name, (ranks, layout, _) in LAYOUTS.items():
        ours = [case for case in cases if case.layout == name]
        per_rank = gloo_pool.run(train_cases, ranks, layout, ours, timeout=600.0, join=ranks > 1)
        for case, found, *others in zip(ours, *per_rank, strict=True):
            assert all(math.isfinite(loss) for loss in found), f"{case}: {found}"
            assert found[-1] < found[0], f"{case}: {found}"
            assert all(other == found for other in others), f"{case}: ranks disagree"


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Of the schema as it is."""
    return all_refusals()


def test_the_page_says_what_the_schema_does(tables: Tables) -> None:
    prose, _, below = PAGE.read_text().partition(MARKER)
    assert prose
    again = "python tools/recipe_layouts.py --markdown docs/recipe_layouts.md"
    assert below.strip() == render(tables).strip(), f"rewrite it: {again}"


def test_what_is_refused(tables: Tables) -> None:
    """The small Llama's 192 columns have no whole blocks of 128 in two parts."""
    assert set(tables.refused) == {Case("blockwise", level, "TP2") for level in LEVELS}


def test_every_refusal_names_a_key_and_a_remedy(tables: Tables) -> None:
    reasons = {
        *tables.refused.values(),
        *(r for found in tables.with_setting.values() for r in found.values()),
    }
    assert len(reasons) > 10
    for reason in reasons:
        keys = re.findall(r"\b(?:precision|parallel|model|data|train|parametrization)\.[a-z0-9_.]+", reason)
        assert any(key.rstrip(".") in key_table().keys for key in keys), reason
        assert re.search(r"; (?:write|remove|legal:) ", reason), reason
        assert str(PAGE.parents[1]) not in reason, "a path of this machine"


def test_levels_are_told_in_runs() -> None:
    assert level_range(LEVELS) == "O0 to O3"
    assert level_range(["O0", "O2", "O3"]) == "O0, O2 to O3"
    assert level_range(["O1"]) == "O1"
    assert level_range([]) == ""


def test_every_recipe_level_and_layout_trains_in_some_case(gloo_pool) -> None:
    sample = covering(legal_on_the_tiny_model())[::5]
    assert {value for case in sample for pair in pairs(case) for value in pair} == {
        *RECIPES,
        *LEVELS,
        *LAYOUTS,
    }
    check(sample, gloo_pool)


@pytest.mark.slow
def test_a_sample_that_holds_every_legal_pair_trains(gloo_pool) -> None:
    legal = legal_on_the_tiny_model()
    assert legal == list(all_cases())
    sample = covering(legal)
    assert {pair for case in sample for pair in pairs(case)} == {pair for c in legal for pair in pairs(c)}
    check(sample, gloo_pool)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_that_is_legal_trains(gloo_pool) -> None:
    check(legal_on_the_tiny_model(), gloo_pool)
