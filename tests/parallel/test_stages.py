"""Splitting a model into stages, and who holds which: numbers worked out by hand."""

from __future__ import annotations

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.world import check_world
from fp8train.parallel.pipeline import StagePlacement
from fp8train.parallel.stages import head_cost, part_of, plan_stages, split_layers, stages_of_rank
from tests.training.tiny import tiny_config


@pytest.mark.parametrize(
    ("layers", "stages", "head", "counts"),
    [
        (4, 2, 0.0, [2, 2]),
        (5, 2, 0.0, [2, 3]),  # not to the stage with the embedding
        (6, 4, 0.0, [1, 1, 2, 2]),
        (8, 4, 1.0, [2, 2, 2, 2]),  # 3 at most, as with [2, 2, 3, 1]
        (9, 4, 2.5, [2, 3, 3, 1]),
        (8, 2, 3.4, [6, 2]),  # 6 and 5.4; 5 and 6.4 would be worse
        (32, 4, 0.6, [8, 8, 8, 8]),  # 8.6 at most; giving one away makes 9
        (3, 3, 9.0, [1, 1, 1]),
    ],
)
def test_blocks_go_to_the_cheapest_stage(layers: int, stages: int, head: float, counts: list[int]) -> None:
    assert split_layers(layers, stages, head_cost=head) == counts


def test_head_cost_of_llama_2_7b() -> None:
    model = tiny_config(
        [
            "model.hidden_size=4096",
            "model.num_heads=32",
            "model.num_kv_heads=32",
            "model.ffn_hidden_size=11008",
        ]
    ).model
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 4096 * 2048
    assert head_cost(model, 32000, 2048) == pytest.approx(32000 * 4096 / block)
    assert head_cost(model, 31999, 2048) == head_cost(model, 32000, 2048), "padding is multiplied too"


@pytest.mark.parametrize(
    ("schedule", "per_rank", "held"),
    [
        ("1f1b", 1, [(0,), (1,), (2,)]),
        ("interleaved_1f1b", 2, [(0, 3), (1, 4), (2, 5)]),
        ("interleaved_zero_bubble", 3, [(0, 3, 6), (1, 4, 7), (2, 5, 8)]),
        ("zbv", 2, [(0, 5), (1, 4), (2, 3)]),
    ],
)
def test_placement(schedule: str, per_rank: int, held: list[tuple[int, ...]]) -> None:
    assert [stages_of_rank(schedule, pp=3, per_rank=per_rank, rank=rank) for rank in range(3)] == held


def test_parts_cover_the_model_once() -> None:
    config = tiny_config(
        ["model.num_layers=7", "parallel.pp=2", "parallel.pipeline.schedule=zbv", "model.family=gpt"]
    )
    stages = plan_stages(config, 64)
    placements = [StagePlacement(stages, "zbv", pp=2, rank=rank) for rank in range(2)]
    parts = [part_of(placement.held) for placement in placements]
    assert sorted(layer for part in parts for layer in part.layers) == list(range(7))
    assert [(part.begins, part.ends) for part in parts] == [(True, True), (False, False)]
    assert placements[0].uses(tied=True) == {"embedding.weight": 2}
    assert placements[0].uses(tied=False) == placements[1].uses(tied=True) == {}
    last_layer, first_layer = parts[0].layers[-1], parts[0].layers[0]
    assert placements[0].launch_group(f"layers.{last_layer}.mlp.up.weight") == 0
    assert placements[0].launch_group("final_norm.weight") == 0
    assert placements[0].launch_group(f"layers.{first_layer}.mlp.up.weight") == 1
    assert placements[0].launch_group("embedding.weight") == 1


def test_an_explicit_split_is_taken() -> None:
    config = tiny_config(["model.num_layers=5", "parallel.pp=2", "parallel.pipeline.layers=[4, 1]"])
    assert [stage.layers for stage in plan_stages(config, 64)] == [(0, 1, 2, 3), (4,)]


@pytest.mark.parametrize(
    ("schedule", "batch", "message"),
    [
        ("1f1b", 3, "at least parallel.pp = 4 micro-batches a step, not 3; nearest legal .*: 4"),
        ("interleaved_1f1b", 9, "equal rounds of parallel.pp = 4 or more, not 9; nearest legal .*: 8 or 10"),
    ],
)
def test_micro_batches_that_the_schedule_cannot_run(schedule: str, batch: int, message: str) -> None:
    overrides = ["model.num_layers=8", "parallel.pp=4", f"parallel.pipeline.schedule={schedule}"]
    with pytest.raises(ConfigError, match=message):
        check_world(tiny_config([*overrides, f"train.global_batch_size={batch}"]), 4)
    assert check_world(tiny_config([*overrides, "train.global_batch_size=8"]), 4) == (1, 8)
