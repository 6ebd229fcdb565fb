"""What a rank shows of itself to the others: two small files in the run directory.

``heartbeats/rankN`` is a record of fixed size, written again and again in place. ``heartbeats/rankN.json``
says once who that is, and which groups its counts are about. Machines share the run directory, but no clock:
a record holds durations by its writer's clock and counters, never a time, and a reader times by its own clock
how long a record has not changed.

A record costs one write of 4 KiB per interval, by a thread of its own. Where ranks of other machines read it,
it is synced too: a network file system may keep it for half a minute otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp8train.comm.calls import Calls, Wait
from fp8train.comm.progress import Progress
from fp8train.files import replace_file
from fp8train.watch.process import Identity, own_identity

RECORD_BYTES = 4096

_RECORDED = ("alive", "beats", "still_s", "limit_s", "step", "phase")

ENDED = "ended"
"""Stands in place of a phase: the rank has left the run."""


@dataclass(frozen=True)
class Group:
    """Calls over one group, as :class:`fp8train.comm.calls.GroupCalls` counts them."""

    name: str
    ranks: tuple[int, ...]
    entered: int = 0
    left: int = 0
    waiting: Wait | None = None


@dataclass(frozen=True)
class Heartbeat:
    """A rank at a moment.

    Attributes:
        rank: which.
        process: who that is.
        alive: grows with every record.
        beats: grows with everything that the main thread does.
        still_s: seconds for which it has done nothing.
        limit_s: seconds for which it may, in its phase.
        step: 0-based; -1 before the first.
        phase: of :data:`fp8train.comm.progress.Phase`, or :data:`ENDED`.
        groups: its calls, by group.
    """

    rank: int
    process: Identity
    alive: int = 0
    beats: int = 0
    still_s: float = 0.0
    limit_s: float = 0.0
    step: int = -1
    phase: str = "start"
    groups: tuple[Group, ...] = field(default_factory=tuple)


class Pulse:
    """Takes the heartbeats of this rank from what its main thread sets."""

    def __init__(self, rank: int, progress: Progress, calls: Calls) -> None:
        self._rank, self._progress, self._calls = rank, progress, calls
        self.process = own_identity()
        self._alive = 0

    def take(self, *, still_s: float, limit_s: float, ended: bool = False) -> Heartbeat:
        """One of them; ``still_s`` and ``limit_s`` as in :class:`Heartbeat`."""
        self._alive += 1
        progress, calls = self._progress, self._calls
        return Heartbeat(
            self._rank,
            self.process,
            self._alive,
            progress.beats + calls.moves,
            round(still_s, 3),
            limit_s,
            progress.step,
            ENDED if ended else progress.phase,
            tuple(
                Group(group.name, group.ranks, group.entered, group.left, group.waiting)
                for group in calls.groups
                if len(group.ranks) > 1
            ),
        )


class HeartbeatFile:
    """Writes the heartbeats of this rank; of one thread."""

    def __init__(self, folder: Path, rank: int, *, sync: bool) -> None:
        """``sync``: ranks of other machines read them."""
        self._folder, self._rank, self._sync = folder, rank, sync
        self._groups = -1
        self._fd = -1

    def write(self, beat: Heartbeat) -> None:
        """Write the newest one.

        Raises:
            OSError: it cannot be written; try again with the next one.
        """
        if self._fd < 0:
            path = self._folder / f"rank{self._rank}"
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        if len(beat.groups) != self._groups:
            whose = {"process": asdict(beat.process), "groups": [(g.name, g.ranks) for g in beat.groups]}
            replace_file(self._folder / f"rank{self._rank}.json", json.dumps(whose).encode())
            self._groups = len(beat.groups)
        record = {name: getattr(beat, name) for name in _RECORDED}
        record["groups"] = [(g.entered, g.left, _fields(g.waiting)) for g in beat.groups]
        data = json.dumps(record, separators=(",", ":")).encode()
        os.pwrite(self._fd, data.ljust(RECORD_BYTES - 1) + b"\n", 0)
        if self._sync:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Let go of the file, which stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read(folder: Path, rank: int) -> Heartbeat | None:
    """The newest heartbeat of a rank; None while there is none, or where it is just being written. The file
    is opened anew each time: that is when a network file system looks for what others wrote."""
    try:
        record = json.loads((folder / f"rank{rank}").read_bytes())
        whose = json.loads((folder / f"rank{rank}.json").read_bytes())
        counts = record.pop("groups")
        groups = tuple(
            Group(name, tuple(ranks), entered, left, _wait(wait))
            for (name, ranks), (entered, left, wait) in zip(whose["groups"], counts, strict=True)
        )
        return Heartbeat(rank, Identity(**whose["process"]), groups=groups, **record)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _fields(wait: Wait | None) -> Sequence[Any] | None:
    return None if wait is None else (wait.number, wait.what, wait.peers)


def _wait(fields: Sequence[Any] | None) -> Wait | None:
    if fields is None:
        return None
    number, what, peers = fields
    return Wait(number, what, None if peers is None else tuple(peers))
