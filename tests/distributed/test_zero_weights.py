"""New weights from their owners: the same values whatever is waited for when, and few messages at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.zero import partition
from fp8train.parallel.zero_weights import Matrix, WeightGather

SHAPES = {f"layers.{i}": (3 + i, 4) for i in range(9)} | {"norm": (5,)}


class Counting(CountedGroup):
    """Also tells how many gathers were under way at once, and in which order they started.

    Attributes:
        travelling: gathers whose end nobody has waited for.
        most: their largest number so far.
        started: purpose and bytes of each gather.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.travelling, self.most = 0, 0
        self.started: list[tuple[str, int]] = []

    def all_gather(self, output: Tensor, tensor: Tensor, *, purpose: str) -> Callable[[], None]:
        """As the parent's."""
        wait = super().all_gather(output, tensor, purpose=purpose)
        self.travelling += 1
        self.most = max(self.most, self.travelling)
        self.started.append((purpose, output.nbytes))

        def waited() -> None:
            wait()
            self.travelling -= 1

        return waited


def value(fqn: str, update: int) -> Tensor:
    """All rows of a weight after an update; norms are integers too, but travel as FP32."""
    numel = torch.Size(SHAPES[fqn]).numel()
    codes = (torch.arange(numel) * 7 + 31 * list(SHAPES).index(fqn) + 101 * update) % 251
    return codes.view(SHAPES[fqn]).to(torch.float32 if fqn == "norm" else torch.uint8)


def gathered(
    group: dist.ProcessGroup, rank: int, world_size: int, kind: str, bucket_bytes: float, order: list[str]
) -> tuple[int, int, list[tuple[str, int]]]:
    """Runs in the pool: three updates; the second is waited for in part before the third comes. Returns how
    many gathers were under way at most, how many there are in one update, and all that started."""
    counting = Counting(group)
    plan = partition(SHAPES, world_size, kind)
    weights = {fqn: torch.zeros_like(value(fqn, 0)) for fqn in SHAPES}
    gather = WeightGather(
        [Matrix(fqn, weights[fqn]) for fqn in SHAPES],
        plan,
        counting,
        bucket_bytes=bucket_bytes,
        purposes=dict.fromkeys(SHAPES, "weights"),
    )
    gather.wait(order[0])  # nothing has started, so nothing is waited for
    once = 0
    for update, waited in ((1, order), (2, order[:3]), (3, [*order, *order])):
        for fqn, rows in plan.owned(rank).items():
            weights[fqn][rows.start : rows.stop] = value(fqn, update)[rows.start : rows.stop]
        gather.start()
        for fqn in waited:
            gather.wait(fqn)
            assert torch.equal(weights[fqn], value(fqn, update)), (fqn, update)
        once = once or len(counting.started)
    assert counting.travelling == 0
    return counting.most, once, counting.started


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_order_of_waits_gives_every_rank_every_row(gloo_pool, world_size: int) -> None:
    orders = (list(SHAPES), list(SHAPES)[::-1], list(SHAPES)[1::2] + list(SHAPES)[::2])
    for kind, bucket_bytes in (("rows", 1.0), ("whole_tensor", 1.0), ("rows", 60.0), ("rows", 1e9)):
        for order in orders:
            results = gloo_pool.run(gathered, world_size, kind, bucket_bytes, order, timeout=120.0)
            most, once, started = results[0]
            assert all(result == results[0] for result in results), "ranks start other collectives"
            assert most == min(4, once)
            assert once == {1.0: 10, 60.0: 7, 1e9: 2}[bucket_bytes]
            # In the order of use, whatever is waited for first.
            assert started[once : once + 4] == started[:4]
