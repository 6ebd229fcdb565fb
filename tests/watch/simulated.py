"""A job without processes: ranks that carry out programs of collectives and messages until nothing moves.

Who hangs is set, so the truth about a standstill is known whatever :mod:`fp8train.watch.verdict` thinks.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from fp8train.comm.calls import Calls, GroupCalls, Wait
from fp8train.watch.heartbeat import Group, Heartbeat
from fp8train.watch.process import Identity
from fp8train.watch.verdict import Picture

Operation = (
    tuple  # ("call", group) ("begin", group) ("wait",) ("compute",) ("sync",) ("stages", micro_batches)
)


def mesh_groups(**axes: int) -> dict[str, list[tuple[int, ...]]]:
    """All groups over every set of axes (the last one innermost), by name; of one rank too."""
    names, found = list(axes), {}
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            sets: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for rank, place in enumerate(itertools.product(*(range(n) for n in axes.values()))):
                sets[tuple(p for p, name in zip(place, names, strict=True) if name not in chosen)].append(
                    rank
                )
            found[" x ".join(chosen)] = [tuple(ranks) for ranks in sets.values()]
    return found


class Job:
    """Ranks on a mesh; ``blocking``: hosts stand in waits, as with gloo."""

    def __init__(self, *, blocking: bool = True, **axes: int) -> None:
        self.blocking, self.groups = blocking, mesh_groups(**axes)
        self.size = len(self.groups[" x ".join(axes)][0])
        self.calls: list[dict[str, GroupCalls]] = []
        for rank in range(self.size):
            calls = Calls()
            mine = {n: next(s for s in sets if rank in s) for n, sets in self.groups.items()}
            names = [*mine.items(), ("pp schedule", mine.get("pp", (rank,)))]
            self.calls.append({name: calls.group(name, ranks) for name, ranks in names})
        self.sent: dict[tuple[int, int, str], int] = defaultdict(int)
        self.at = ["start"] * self.size
        self.steps = [-1] * self.size

    def run(self, program: Sequence[Operation], *, stuck: dict[int, int], steps: int = 2) -> None:
        """Every rank carries out ``program`` ``steps`` times, but rank r hangs before its ``stuck[r]``-th
        event (an operation, or something a stage does)."""
        ranks = {rank: self._rank(rank, program, steps) for rank in range(self.size)}
        events = dict.fromkeys(ranks, 0)
        moved = True
        blocked: dict[int, object] = dict.fromkeys(ranks, None)
        while moved:
            moved = False
            for rank, life in list(ranks.items()):
                while rank in ranks:
                    if blocked[rank] is not None and not blocked[rank]():  # type: ignore[operator]
                        break
                    blocked[rank] = None
                    if events[rank] == stuck.get(rank, -1):
                        break
                    try:
                        blocked[rank] = next(life)
                        events[rank] += 1
                        moved = True
                    except StopIteration:
                        self.at[rank] = "ended"
                        del ranks[rank]

    def _rank(self, rank: int, program: Sequence[Operation], steps: int) -> Iterator[object]:
        """The life of a rank: yields None, or whether what it waits for has come."""
        mine, open_calls = self.calls[rank], []

        def complete(name: str, number: int) -> bool:
            return all(self.calls[other][name].entered >= number for other in mine[name].ranks)

        for step in range(steps):
            self.steps[rank], self.at[rank] = step, "forward"
            for kind, *rest in program:
                if kind in ("call", "begin"):
                    name = rest[0]
                    mine[name].entered += 1
                    open_calls.append((name, mine[name].entered))
                if kind in ("call", "wait") and (self.blocking or (kind == "call" and rest[-1] == "host")):
                    while open_calls:
                        name, number = open_calls.pop(0)
                        mine[name].waiting = Wait(number, f"all_reduce/{name}")
                        yield lambda name=name, number=number: complete(name, number)
                        mine[name].waiting = None
                        mine[name].left += 1
                elif kind == "sync":
                    pending, open_calls = open_calls, []
                    yield lambda pending=pending: all(complete(*call) for call in pending)
                elif kind == "stages":
                    yield from self._stages(rank, *rest)
                else:
                    yield None
        yield None

    def _stages(self, rank: int, micro_batches: int) -> Iterator[object]:
        """All forwards, then all backwards, of a pipeline."""
        schedule = self.calls[rank]["pp schedule"]
        stages, place = schedule.ranks, schedule.ranks.index(rank)
        schedule.entered += 1
        waiting = Wait(schedule.entered, "states of other stages")
        for way, before, after in (("forward", place - 1, place + 1), ("backward", place + 1, place - 1)):
            for _ in range(micro_batches):
                schedule.waiting = waiting
                if 0 <= before < len(stages):
                    source = stages[before]
                    self.sent[rank, source, f"received {way}"] += 1
                    number = self.sent[rank, source, f"received {way}"]
                    yield lambda s=source, n=number, w=way: self.sent[s, rank, w] >= n
                schedule.waiting = None
                yield None  # computes
                schedule.waiting = waiting
                if 0 <= after < len(stages):
                    self.sent[rank, stages[after], way] += 1
        schedule.waiting = None
        schedule.left += 1

    def pictures(self) -> dict[int, Picture]:
        """All ranks as they stand."""
        return {
            rank: Picture(
                Heartbeat(
                    rank,
                    Identity(f"host{rank // 2}", 100 + rank, "", 0),
                    step=self.steps[rank],
                    phase=self.at[rank],
                    groups=tuple(
                        Group(g.name, g.ranks, g.entered, g.left, g.waiting)
                        for g in self.calls[rank].values()
                        if len(g.ranks) > 1
                    ),
                )
            )
            for rank in range(self.size)
        }
