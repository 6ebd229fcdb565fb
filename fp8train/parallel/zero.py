"""ZeRO-1: which rank keeps the optimizer states of what.

Two partitions. ``whole_tensor`` gives each tensor to one rank, the largest first, always to the least loaded
(FP8-LM, algorithm 1): scales per tensor need no agreement, but with more ranks than large tensors some ranks
have nothing. ``rows`` cuts every matrix into equal runs of rows, balanced at any number of ranks; vectors,
which are small, go whole to the least loaded rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["rows", "whole_tensor"]


@dataclass(frozen=True)
class Rows:
    """A run of rows of a tensor (elements of a vector): ``start .. stop`` of the first dimension."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """Owners of all parameters that a group of ranks shares.

    Attributes:
        ranks: number of owners.
        owners: ``{fqn: rows of each rank}``; empty runs where a rank owns nothing.
        shapes: ``{fqn: shape}`` as the ranks hold them.
    """

    ranks: int
    owners: Mapping[str, Sequence[Rows]]
    shapes: Mapping[str, tuple[int, ...]]

    def owned(self, rank: int) -> dict[str, Rows]:
        """The rows that ``rank`` owns, by FQN; without parameters of which it owns none."""
        return {fqn: rows[rank] for fqn, rows in self.owners.items() if len(rows[rank])}

    def elements(self, fqn: str, rank: int) -> int:
        """How many elements of one parameter ``rank`` owns."""
        return len(self.owners[fqn][rank]) * math.prod(self.shapes[fqn][1:])

    def loads(self) -> list[int]:
        """How many elements each rank owns in all."""
        return [sum(self.elements(fqn, rank) for fqn in self.owners) for rank in range(self.ranks)]


def partition(
    shapes: Mapping[str, tuple[int, ...]], ranks: int, kind: Kind, *, in_rows: Sequence[str] = ()
) -> Partition:
    """Assign every row of every tensor to one owner.

    Args:
        shapes: ``{fqn: shape}``, the same on all ranks.
        ranks: number of owners.
        kind: how; see the module.
        in_rows: tensors that are cut into rows whatever ``kind`` says.
    """
    owners: dict[str, list[Rows]] = {}
    loads = [0] * ranks
    for fqn, shape in shapes.items():
        if fqn in in_rows or (kind == "rows" and len(shape) > 1):
            cuts = [rank * shape[0] // ranks for rank in range(ranks + 1)]
            owners[fqn] = [Rows(a, b) for a, b in pairwise(cuts)]
            for rank, rows in enumerate(owners[fqn]):
                loads[rank] += len(rows) * math.prod(shape[1:])
    # Sorting is stable: of equal sizes the first named is the first placed, on every rank.
    for fqn in sorted((name for name in shapes if name not in owners), key=lambda n: -math.prod(shapes[n])):
        rank = loads.index(min(loads))
        loads[rank] += math.prod(shapes[fqn])
        size = shapes[fqn][0]
        owners[fqn] = [Rows(0, size) if r == rank else Rows(0, 0) for r in range(ranks)]
    return Partition(ranks, {fqn: owners[fqn] for fqn in shapes}, dict(shapes))
