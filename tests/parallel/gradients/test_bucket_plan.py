"""Which buckets share memory: by hand, and that no plan lets one be needed before it may be forgotten."""

from __future__ import annotations

import random

import pytest

from fp8train.parallel.gradients.bucket_plan import Contributor, fewest_places, part_of, plan_buckets


def backward_of(layers: int) -> list[str]:
    """Names of parameters, last first."""
    names = ["embedding.weight", "positions.weight"]
    for i in range(layers):
        inside = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")
        names += [f"layers.{i}.{name}.weight" for name in inside]
    return [*reversed((*names, "final_norm.weight", "final_norm.bias", "head.weight"))]


def planned(layers: int, capacity: int, numel: int = 10, places: int | None = 2) -> list[tuple[str, ...]]:
    names = backward_of(layers)
    parameters = [Contributor(fqn, numel, "norm" if "norm" in fqn else "matrix") for fqn in names]
    plan = plan_buckets(parameters, lambda kind: capacity, places=places)
    return [
        (bucket.kind, len(bucket.members), *bucket.parts, bucket.place, bucket.after)  # type: ignore[misc]
        for bucket in plan
    ]


def test_parts_are_blocks_and_what_is_before_and_after_them() -> None:
    parts = [part_of(fqn) for fqn in backward_of(2)]
    assert parts == [*["head"] * 3, *["layers.1"] * 6, *["layers.0"] * 6, *["embedding"] * 2]


def test_by_hand() -> None:
    """Two blocks of four matrices; a bucket takes three tensors. Norms are complete with block 0."""
    assert planned(2, 30) == [
        ("matrix", 3, 0, 1, 0, None),  # head, down 1, up 1
        ("norm", 3, 0, 1, 1, None),  # both of the end, mlp 1
        ("matrix", 3, 1, 2, 2, None),  # out 1, qkv 1, down 0
        ("matrix", 3, 2, 2, 0, 0),  # up 0, out 0, qkv 0: the first bucket had nothing of block 0
        ("norm", 3, 1, 2, 4, None),
        ("matrix", 2, 3, 3, 2, 2),  # positions, embedding
    ]


def test_buckets_of_one_matrix_take_turns_of_a_block() -> None:
    """Four matrices a block: the fifth bucket is the first that may lie where the first one did."""
    plan = [bucket for bucket in planned(3, 1) if bucket[0] == "matrix"]
    places = [bucket[4] for bucket in plan]
    assert len(set(places)) == 4 and places[4:] == places[:-4]


def test_without_places_nothing_is_shared() -> None:
    plan = planned(3, 30, places=None)
    assert [bucket[4] for bucket in plan] == list(range(len(plan)))
    assert {bucket[5] for bucket in plan} == {None}


@pytest.mark.parametrize("seed", range(20))
def test_no_place_is_needed_before_its_bucket_may_be_forgotten(seed: int) -> None:
    draw = random.Random(seed)
    names = backward_of(draw.randint(1, 6))
    parameters = [Contributor(f, draw.randint(1, 40), draw.choice("ab")) for f in names]
    capacity, places = draw.choice((1, 20, 50, 90)), fewest_places(draw.choice((1, 2)))
    plan = plan_buckets(parameters, lambda kind: capacity, places=places)
    assert sorted(m for bucket in plan for m in bucket.members) == list(range(len(names)))
    owner: dict[int, int] = {}
    complete: list[int] = []
    for number, bucket in enumerate(plan):
        assert owner.get(bucket.place) == bucket.after
        owner[bucket.place] = number
        complete.append(bucket.members[-1])
        if bucket.after is not None:
            before = plan[bucket.after]
            assert before.kind == bucket.kind and before.parts[1] < bucket.parts[0]
            # Launched by then, for buckets launch in order and each is complete.
            assert max(plan[i].parts[1] for i in range(bucket.after + 1)) < bucket.parts[0]
    assert complete == sorted(complete)
