"""Owners under ZeRO: every row once, balanced as published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fp8train.parallel.zero import Kind, partition
from tools.zero_balance import hidden_matrices

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHAPES = {"a": (64, 8), "b": (7, 3), "n": (5,), "c": (1, 16), "m": (5,)}


@pytest.mark.parametrize("kind", ["rows", "whole_tensor"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_row_has_one_owner(kind: Kind, ranks: int) -> None:
    plan = partition(SHAPES, ranks, kind)
    for fqn, shape in SHAPES.items():
        rows = [row for one in plan.owners[fqn] for row in range(one.start, one.stop)]
        assert rows == list(range(shape[0])), fqn
        if kind == "whole_tensor" or len(shape) == 1:
            assert sum(len(one) > 0 for one in plan.owners[fqn]) == 1, fqn
    assert sum(plan.loads()) == sum(map(math.prod, SHAPES.values()))
    assert [set(plan.owned(rank)) for rank in range(ranks)] == [
        {fqn for fqn in SHAPES if len(plan.owners[fqn][rank])} for rank in range(ranks)
    ]


def greedy_loads(sizes: list[int], ranks: int) -> list[int]:
    """FP8-LM's algorithm 1, as the paper states it."""
    loads = [0] * ranks
    for size in sorted(sizes, reverse=True):
        loads[min(range(ranks), key=lambda j: loads[j])] += size
    return loads


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_whole_tensor_is_the_papers_algorithm(ranks: int) -> None:
    plan = partition(SHAPES, ranks, "whole_tensor")
    assert plan.loads() == greedy_loads([math.prod(shape) for shape in SHAPES.values()], ranks)


def test_rows_where_asked() -> None:
    plan = partition(SHAPES, 2, "whole_tensor", in_rows=["a"])
    assert [len(rows) for rows in plan.owners["a"]] == [32, 32]


# Largest load / mean for greedy whole tensors, from the sizes of the models' matrices.
PUBLISHED = {
    "gpt/7b.yaml": {8: 1.0, 32: 1.0, 64: 1.17, 128: 1.33, 256: 2.67, 512: 5.33},
    "llama/llama3_8b.yaml": {128: 2.15},  # with qkv and gate/up fused
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_balance_of_presets(name: str) -> None:
    shapes = hidden_matrices(CONFIGS / name)
    for ranks, imbalance in PUBLISHED[name].items():
        whole, rows = (partition(shapes, ranks, kind).loads() for kind in ("whole_tensor", "rows"))
        assert max(whole) * ranks / sum(whole) == pytest.approx(imbalance, abs=0.005)
        assert max(rows) * ranks / sum(rows) == pytest.approx(1.0, abs=1e-9)
