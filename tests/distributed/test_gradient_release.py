"""Gradients released during backward on several ranks: the same bits as without, and one decision for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.processes import Layout, joined_processes
from fp8train.step.consistency import check_replicas
from fp8train.step.trainer import Trainer
from tests.step.test_gradient_release import bits, broken_below, train
from tests.training.tiny import VOCAB, batches, tiny_config

SHARED = ("optimizer.clip_grad_norm=0", "model.num_layers=3", "precision.gradient.bucket_mib=0.002")
WIDER = ("model.hidden_size=64", "model.num_heads=4", "model.head_dim=64", "model.ffn_hidden_size=256")
OWNERS = ("parallel.zero=1", "parallel.zero_partition=rows")
ALONE, PARTS = Layout(), Layout(tp=2)
CASES: dict[str, tuple[Layout, list[str]]] = {
    "O0": (ALONE, ["precision.level=O0"]),
    "O2": (ALONE, ["precision.level=O2"]),
    "O2, BF16": (ALONE, ["precision.level=O2", "precision.gradient.fp8.reduce=bf16"]),
    "O2, paper": (ALONE, ["precision.level=O2", "precision.profile=paper"]),
    "O1, delayed, full": (
        ALONE,
        ["precision.level=O1", "precision.recipe=te_delayed", "train.activation_checkpointing=full"],
    ),
    "O0, owners": (ALONE, ["precision.level=O0", *OWNERS]),
    "O3, owners": (ALONE, ["precision.level=O3", *OWNERS]),
    "O3, owners of whole tensors": (
        ALONE,
        ["precision.level=O3", "parallel.zero=1", "parallel.zero_partition=whole_tensor"],
    ),
    "O2, paper, owners": (ALONE, ["precision.level=O2", "precision.profile=paper", *OWNERS]),
    "O0, TP": (PARTS, ["precision.level=O0"]),
    "O2, paper, TP": (PARTS, ["precision.level=O2", "precision.profile=paper"]),
    "O2, delayed, TP, selective": (
        PARTS,
        ["precision.level=O2", "precision.recipe=te_delayed", "train.activation_checkpointing=selective"],
    ),
    "O2, CP": (Layout(cp=2), ["precision.level=O2"]),
    "O2, two nodes": (ALONE, ["precision.level=O2", "precision.gradient.fp8.node_size=2"]),
    "O3, TP, owners": (PARTS, ["precision.level=O3", *OWNERS]),
}


def trainer_of(name: str, world_size: int, *, release: bool) -> Trainer:
    layout, overrides = CASES[name]
    config = tiny_config(
        [
            *(*SHARED, *overrides, f"parallel.tp={layout.tp}", f"parallel.cp={layout.cp}"),
            f"train.micro_batch_size={8 * layout.model_ranks // world_size}",
            f"train.gradient_release={str(release).lower()}",
            *(WIDER if layout.tp > 1 else ()),
        ]
    )
    return Trainer(config, joined_processes(torch.device("cpu"), layout), vocab_size=VOCAB)


def differences(group: dist.ProcessGroup, rank: int, world_size: int, names: list[str]) -> dict[str, Any]:
    """Runs in the pool: of each case, whether results are those of a run without after five steps, which
    tensors are not, whether memory was shared, and whether the last step was applied."""
    result = {}
    for name in names:
        plain, released = (trainer_of(name, world_size, release=release) for release in (False, True))
        expected, found = train(plain, 0, 5), train(released, 0, 5)
        check_replicas(released)
        one, two = bits(plain), bits(released)
        store = released.store
        differ = [key for key in one if one[key] != two[key]]
        result[name] = found == expected, differ, len(store.lasting) < len(store.buckets), found[-1][2]
    return result


OF_FOUR = ["O3, TP, owners", "O2, two nodes"]
OF_TWO = [name for name in CASES if name not in OF_FOUR]


@pytest.mark.parametrize(
    ("world_size", "names"),
    [(2, OF_TWO[::2]), (2, OF_TWO[1::2]), (4, OF_FOUR)],
    ids=["even", "odd", "four"],
)
def test_ranks_have_the_bits_of_ranks_without(gloo_pool, world_size: int, names: list[str]) -> None:
    for result in gloo_pool.run(differences, world_size, names, timeout=170.0):
        for name, found in result.items():
            assert found == (True, [], True, True), name


def break_one_rank(
    group: dist.ProcessGroup, rank: int, world_size: int, name: str, one_row: bool
) -> tuple[Any, ...]:
    """Runs in the pool: in the third step the gradients of the last rank alone break: those below block 1,
    or the last row of one of its matrices."""
    trainer = trainer_of(name, world_size, release=True)
    data, last = batches(trainer.config, trainer.processes), rank == world_size - 1
    train(trainer, 0, 2)
    with ExitStack() as stack:
        if one_row:
            stack.enter_context(row_of_infinities(trainer, "layers.1.mlp.up.weight", last=last))
        else:
            stack.enter_context(broken_below(trainer, 1, math.nan if last else 1.0))
        result = trainer.step(2, data.batch(2))
    check_replicas(trainer)
    assert trainer.store.released is not None
    after = (result.applied, result.partly, trainer.updates, trainer.store.released.handed_on)
    healthy = trainer.step(3, data.batch(3))
    check_replicas(trainer)
    finite = all(bool(torch.isfinite(t.float()).all()) for t in trainer.state_tensors().values())
    return *after, healthy.applied, float(healthy.loss), finite


@contextmanager
def row_of_infinities(trainer: Trainer, fqn: str, *, last: bool) -> Iterator[None]:
    """The last row of this gradient is infinite on the ``last`` rank."""
    slot, contribute = int(trainer.store.sink_slot(fqn).slot), trainer.store.contribute

    def broken(number: int, compute: Callable[[], Tensor]) -> None:
        gradient = compute()
        if last and number == slot:
            gradient[-1] = math.inf
        contribute(number, lambda: gradient)

    trainer.store.contribute = broken  # type: ignore[method-assign]
    yield
    trainer.store.contribute = contribute  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("name", "one_row"),
    [("O2", False), ("O3, owners", False), ("O2, paper, TP", False), ("O0, owners", True), ("O0, TP", True)],
)
def test_a_rank_that_breaks_halfway_stops_all_at_one_bucket(gloo_pool, name: str, one_row: bool) -> None:
    first, second = gloo_pool.run(break_one_rank, 2, name, one_row, timeout=120.0)
    assert first == second
    applied, partly, updates, handed_on, healthy, loss, finite = first
    assert (applied, partly, updates, healthy, finite) == (False, True, 3, True, True)
    assert handed_on > 0 and loss < 4.3
