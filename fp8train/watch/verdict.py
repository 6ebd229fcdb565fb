"""Who is to blame when nobody moves: a decision about one picture of all ranks.

A rank that waits in a collective waits for the members of that group that have entered fewer; one that
waits for a message, for those who exchange it; one that waits in a pipeline's schedule, for the stages that
are neither through it nor waiting in it. Whoever is waited for may wait itself, in another group. So these
are the edges of a graph, and the guilty ones stand at its ends: ranks for which somebody waits and which wait
for nobody. In a job of tensor, data and pipeline parallelism most ranks wait for a rank that is innocent.

With NCCL the host does not stand in collectives, and nobody seems to wait. Then the counts decide alone: who
has entered fewer than another member of a group, is in an earlier step, or in an earlier phase of it.

What is not known is not said. Where all have entered the same collective, nobody is behind: the network, the
collective or a device is stuck. Collectives that torch or DeepSpeed start by themselves are not counted, and
a rank in one of them looks as if it computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fp8train.comm.calls import Wait
from fp8train.comm.progress import PHASES
from fp8train.watch.heartbeat import ENDED, Group, Heartbeat
from fp8train.watch.process import State

Kind = Literal["stopped", "behind", "crossed", "inside", "together"]
"""``stopped``: a process does not run. ``behind``: it runs, and others wait for it. ``crossed``: ranks wait
for each other. ``inside``: all have entered what somebody waits in. ``together``: all stand at one place."""

_NAMED = 3
_STEP_ORDER = {phase: number for number, phase in enumerate(PHASES)} | {
    "backward": PHASES.index("forward"),  # they take turns
    ENDED: len(PHASES),
}


@dataclass(frozen=True)
class Picture:
    """A rank as another one sees it.

    Attributes:
        heartbeat: its last one.
        silent: whether that has not changed for so long that its process cannot be running.
        state: what the machine says of its process, where the observer is on it.
    """

    heartbeat: Heartbeat
    silent: bool = False
    state: State | None = None

    @property
    def runs(self) -> bool:
        """Whether its process does."""
        return not self.silent and self.state not in ("stopped", "gone")

    @property
    def wait(self) -> tuple[Group, Wait] | None:
        """What it waits in. The last group: a schedule's wait is around those of its steps."""
        for group in reversed(self.heartbeat.groups):
            if group.waiting is not None:
                return group, group.waiting
        return None


@dataclass(frozen=True)
class Verdict:
    """Why nobody moves.

    Attributes:
        kind: see :data:`Kind`.
        guilty: ranks that the others wait for; none where nobody is behind.
        message: for a person.
    """

    kind: Kind
    guilty: tuple[int, ...]
    message: str


def decide(ranks: Mapping[int, Picture], *, still_s: float) -> Verdict:
    """Say who is to blame. ``ranks``: all of them, none of which has moved for ``still_s`` seconds."""
    seconds = f"{still_s:.0f} s"
    dead = [rank for rank, picture in ranks.items() if not picture.runs]
    if dead:
        return Verdict("stopped", tuple(dead), _describe(ranks, dead, seconds))
    waits = {rank: _waited_for(rank, ranks) for rank, picture in ranks.items() if picture.wait is not None}
    ends = sorted({other for others in waits.values() for other in others if other not in waits})
    if ends:
        return Verdict("behind", tuple(ends), _describe(ranks, ends, seconds, waits))
    crossed = sorted(rank for rank, others in waits.items() if others)
    complete = sorted({other for others in waits.values() for other in others if not waits[other]})
    if complete:
        return Verdict("inside", tuple(complete), _describe(ranks, complete, seconds))
    if crossed:
        text = f"ranks wait for each other, and none has moved for {seconds}: "
        return Verdict("crossed", tuple(crossed), text + "; ".join(_waits_in(ranks, crossed)))
    free = [rank for rank in ranks if rank not in waits]
    behind = _furthest_behind(ranks, free)
    if behind:
        return Verdict("behind", tuple(behind), _describe(ranks, behind, seconds))
    count = "the process" if len(ranks) == 1 else f"all {len(ranks)} ranks"
    if waits:
        where = _waits_in(ranks, sorted(waits))[0].partition(" is ")[2]
        text = f"no rank has moved for {seconds}, and none is behind: all have entered what they wait in "
        return Verdict("inside", (), f"{text}({where}): the network, a collective or a device is stuck")
    first = ranks[min(ranks)].heartbeat
    text = f"{count} stood still for {seconds}: {_place(first)}"
    if len(ranks) > 1:
        text += "; nobody is behind, so it is something that they share: a device, a network, a disk"
    return Verdict("together", tuple(ranks) if len(ranks) == 1 else (), text)


def _waited_for(rank: int, ranks: Mapping[int, Picture]) -> list[int]:
    """Ranks that this one, which waits, waits for."""
    found = ranks[rank].wait
    assert found is not None
    group, wait = found
    members = group.ranks if wait.peers is None else wait.peers
    others = [other for other in members if other != rank and other in ranks]
    if group.name.endswith(" schedule"):
        return [other for other in others if not _past_or_waiting(ranks[other], group, wait)]
    return [other for other in others if _same(ranks[other], group).entered < wait.number]


def _past_or_waiting(picture: Picture, group: Group, wait: Wait) -> bool:
    theirs = _same(picture, group)
    waits = theirs.waiting is not None and theirs.waiting.number == wait.number
    return waits or theirs.left >= wait.number


def _same(picture: Picture, group: Group) -> Group:
    """A group as another of its members counts it; one that has not made it yet has entered nothing."""
    for theirs in picture.heartbeat.groups:
        if theirs.name == group.name and theirs.ranks == group.ranks:
            return theirs
    return Group(group.name, group.ranks)


def _furthest_behind(ranks: Mapping[int, Picture], candidates: Iterable[int]) -> list[int]:
    """Those of the candidates than which others are further; none where all are equally far."""
    places = {rank: _order(picture.heartbeat) for rank, picture in ranks.items()}
    entered = {rank: _is_behind_in_counts(rank, ranks) for rank in ranks}
    found = [rank for rank in candidates if entered[rank]]
    if not found and len(set(places.values())) > 1:
        found = [rank for rank in candidates if places[rank] == min(places.values())]
    if not found:
        return []
    first = min(places[rank] for rank in found)
    return [rank for rank in found if places[rank] == first]


def _is_behind_in_counts(rank: int, ranks: Mapping[int, Picture]) -> bool:
    return any(
        _same(ranks[other], group).entered > group.entered
        for group in ranks[rank].heartbeat.groups
        for other in group.ranks
        if other in ranks
    )


def _order(heartbeat: Heartbeat) -> tuple[int, int]:
    return heartbeat.step, _STEP_ORDER.get(heartbeat.phase, 0)


def _place(heartbeat: Heartbeat) -> str:
    step = "before the first step" if heartbeat.step < 0 else f"step {heartbeat.step + 1}"
    return f"{step}, phase {heartbeat.phase}"


def _describe(
    ranks: Mapping[int, Picture],
    guilty: list[int],
    seconds: str,
    waits: Mapping[int, list[int]] | None = None,
) -> str:
    lines = [_one(ranks[rank], seconds, waits, ranks) for rank in guilty[:_NAMED]]
    more = len(guilty) - len(lines)
    return "; ".join(lines) + (f"; and {more} more ranks" if more > 0 else "")


def _one(
    picture: Picture, seconds: str, waits: Mapping[int, list[int]] | None, ranks: Mapping[int, Picture]
) -> str:
    beat = picture.heartbeat
    text = f"rank {beat.rank} ({beat.process}) has not moved for {seconds}: {_place(beat)}, "
    if picture.state == "gone":
        return f"{text}gone (its process has ended)"
    if picture.state == "stopped":
        return f"{text}stopped (its process does not run)"
    if picture.silent and picture.state == "runs":
        return f"{text}no sign of life (its process exists, but something holds Python's interpreter lock)"
    if picture.silent:
        return f"{text}no sign of life (its process does not run, or its machine is gone)"
    if beat.phase == ENDED:
        text = f"rank {beat.rank} ({beat.process}) has left the run, "
    elif (inside := picture.wait) is not None:
        where = f"{inside[1].what} of {inside[0].name}"
        return f"{text}still in {where}, which all have entered: its network or device is stuck"
    waiting = [rank for rank, others in (waits or {}).items() if beat.rank in others]
    if not waiting:
        return f"{text}alive, but behind the others"
    other = ranks[min(waiting)].wait
    assert other is not None
    whom = f"rank {waiting[0]}" if len(waiting) == 1 else f"{len(waiting)} ranks"
    verb = "waits" if len(waiting) == 1 else "wait"
    return f"{text}alive, but {whom} {verb} for it in {other[1].what} of {other[0].name}"


def _waits_in(ranks: Mapping[int, Picture], waiting: list[int]) -> list[str]:
    found = []
    for rank in waiting[:_NAMED]:
        place = ranks[rank].wait
        assert place is not None
        where = _place(ranks[rank].heartbeat)
        found.append(f"rank {rank} is in {place[1].what} of {place[0].name}, {where}")
    return found
