"""The thread of every rank that shows signs of life, and ends the run when nobody does anything new.

While the main thread moves, its rank is no part of a hang, and the thread only writes a heartbeat. Once it
has stood still for a quarter of the shortest limit, the thread reads the heartbeats of all ranks too. So no
rank is special: whoever is stopped, another one sees it. When all that run have stood still for as long as
they may, the ranks agree on the first verdict that one of them puts down, and all of them end.

What is measured is measured by this thread's own clock, while it runs. If it did not run for a while (the job
was suspended and continued, the machine paused) nothing that it saw before counts.

The run directory itself may be what hangs. So a second thread, which touches no file, ends a rank that has
stood still for as long as it may while the first one got no answer.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from fp8train.comm.calls import Calls
from fp8train.comm.progress import Progress
from fp8train.config.watchdog_schema import WatchdogConfig
from fp8train.watch.heartbeat import ENDED, Heartbeat, HeartbeatFile, Pulse, read
from fp8train.watch.process import Identity, state_of
from fp8train.watch.verdict import Picture, Verdict, decide

_SUSPENDED_S = 5.0
"""A thread that comes this much too late did not run."""
_NO_ANSWER_S = 30.0
"""How much longer than its limit a rank waits for a file system that does not answer."""
_RANKS_PER_INTERVAL = 64
"""With more ranks each one reads the others' heartbeats less often, for they all lie on one file system."""

_VERDICT_FILE = "verdict.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A verdict, and what was seen.

    Attributes:
        verdict: of this rank or of the one that was first.
        own: whether it is this rank's, which then speaks for all.
        dead: processes that do not run, by rank; of this rank's own look.
    """

    verdict: Verdict
    own: bool
    dead: Mapping[int, Identity]


class Ending(Protocol):
    """What is done about a hang; does not return, but in tests."""

    def __call__(self, found: Found, publish: Callable[[], bool]) -> None:
        """``publish`` puts an own verdict down for the other ranks; False if another one was first."""


class Watchdog:
    """Watches a run while it is entered."""

    def __init__(
        self,
        settings: WatchdogConfig,
        folder: Path,
        progress: Progress,
        calls: Calls,
        *,
        rank: int,
        world_size: int,
        several_machines: bool,
        end: Ending,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        settings: of the run.
        folder: of heartbeats, on a file system that all ranks see.
        progress: of this rank.
        calls: of this rank.
        rank: this one.
        world_size: ranks that are to be watched.
        several_machines: whether some of them are elsewhere.
        end: ends this rank.
        clock: seconds.
        """
        self._settings, self._folder, self._progress, self._calls = settings, folder, progress, calls
        self._rank, self._world_size, self._end, self._clock = rank, world_size, end, clock
        self._file = HeartbeatFile(folder, rank, sync=several_machines)
        self._pulse = Pulse(rank, progress, calls)
        self._warned = False
        self._stop = threading.Event()
        self._still = _Stillness(progress, calls)
        self._ticked = self._answered = clock()
        self._look_at = 0.0
        self._seen: dict[int, tuple[Heartbeat, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._fuse = threading.Thread(target=self._wait_for_answers, name="watchdog fuse", daemon=True)

    def __enter__(self) -> Watchdog:
        self.tick()
        self._thread.start()
        self._fuse.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self._write(self._pulse.take(still_s=0.0, limit_s=0.0, ended=True))
            self._file.close()

    def tick(self) -> Found | None:
        """Show a sign of life, and look at the others if there is reason to. A verdict, if there is one."""
        now = self._clock()
        if now - self._ticked > self._settings.interval_s + _SUSPENDED_S:
            self._still.restart(now)
            self._seen.clear()
        self._ticked = now
        still, limit = self._still.seconds(now), self._limit_s()
        own = self._pulse.take(still_s=still, limit_s=limit)
        self._write(own)
        found = None
        if still < min(limit, self._settings.stopped_timeout_s) / 4:
            self._seen.clear()
        elif (verdict := self._published()) is not None:
            found = Found(verdict, False, self._dead())
        elif now >= self._look_at:
            self._look_at = now + self._settings.interval_s * (self._world_size // _RANKS_PER_INTERVAL)
            found = self._look(now, own)
        self._answered = now
        return found

    def _run(self) -> None:
        while not self._stop.wait(self._settings.interval_s):
            found = self.tick()
            if found is not None and not self._stop.is_set():
                self._end(found, lambda verdict=found.verdict: self._publish(verdict))  # type: ignore[misc]
                return

    def _wait_for_answers(self) -> None:
        """The second thread: end this rank if the first one hangs as well. Touches no file."""
        still, before = _Stillness(self._progress, self._calls), self._clock()
        while not self._stop.wait(self._settings.interval_s):
            now = self._clock()
            if now - before > self._settings.interval_s + _SUSPENDED_S:
                still.restart(now)
            before = now
            late = self._limit_s() + _NO_ANSWER_S
            if still.seconds(now) > late and now - self._answered > _NO_ANSWER_S:
                text = (
                    f"rank {self._rank} ({self._pulse.process}) stood still for {still.seconds(now):.0f} s, "
                    f"phase {self._progress.phase}, and the file system of the run directory does not answer"
                )
                self._end(Found(Verdict("together", (), text), True, {}), lambda: True)
                return

    def _limit_s(self) -> float:
        """How long this rank may stand still where it is."""
        settings, phase = self._settings, self._progress.phase
        if self._progress.steps <= 1:
            return settings.startup_timeout_s
        return settings.save_timeout_s if phase in ("save", "end") else settings.step_timeout_s

    def _write(self, beat: Heartbeat) -> None:
        try:
            self._file.write(beat)
        except OSError as error:
            if not self._warned:
                _logger.warning("heartbeats cannot be written (%s): a hang will name this rank", error)
            self._warned = True

    def _look(self, now: float, own: Heartbeat) -> Found | None:
        """Whether all that run stand still for too long, and who is to blame then."""
        still, limit = own.still_s, own.limit_s
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        pictures = {rank: self._picture(rank, now, limit) for rank in others} | {self._rank: Picture(own)}
        running = [rank for rank, picture in pictures.items() if picture.runs and not _ended(picture)]
        ages = {rank: now - at for rank, (_, at) in self._seen.items()}
        for rank in running:
            if rank != self._rank:
                beat = pictures[rank].heartbeat
                still = min(still, beat.still_s + ages.get(rank, 0.0))
                limit = max(limit, beat.limit_s)
        soon = self._settings.stopped_timeout_s
        dead = [rank for rank, picture in pictures.items() if picture.state in ("stopped", "gone")]
        if still >= limit or (dead and still >= soon and all(ages[rank] >= soon / 2 for rank in dead)):
            return Found(decide(pictures, still_s=still), True, self._dead(pictures))
        return None

    def _picture(self, rank: int, now: float, limit: float) -> Picture:
        beat = read(self._folder, rank)
        last = self._seen.get(rank)
        if beat is not None and (last is None or beat.alive != last[0].alive):
            self._seen[rank] = last = beat, now
        elif last is None:
            self._seen[rank] = last = Heartbeat(rank, Identity("unknown", 0, "", 0)), now
        beat, at = last
        if beat.phase == ENDED:
            return Picture(beat)
        late = now - at > 2.5 * self._settings.interval_s
        return Picture(beat, now - at >= limit / 2, state_of(beat.process) if late else None)

    def _dead(self, pictures: Mapping[int, Picture] | None = None) -> dict[int, Identity]:
        """Ranks of this machine that do not run; without pictures, by what was seen last."""
        if pictures is None:
            beats = {rank: beat for rank, (beat, _) in self._seen.items()}
            return {rank: b.process for rank, b in beats.items() if state_of(b.process) == "stopped"}
        return {rank: p.heartbeat.process for rank, p in pictures.items() if not p.runs}

    def _published(self) -> Verdict | None:
        try:
            record = json.loads((self._folder / _VERDICT_FILE).read_bytes())
            return Verdict(record["kind"], tuple(record["guilty"]), record["message"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def _publish(self, verdict: Verdict) -> bool:
        tmp = self._folder / f".{_VERDICT_FILE}.{self._rank}"
        try:
            tmp.write_text(json.dumps(asdict(verdict)))
            os.link(tmp, self._folder / _VERDICT_FILE)  # whole, and only the first
        except FileExistsError:
            return False
        except OSError:
            tmp.replace(self._folder / _VERDICT_FILE)  # a file system without links
        return True


class _Stillness:
    """For how long a main thread has done nothing, as one thread sees it."""

    def __init__(self, progress: Progress, calls: Calls) -> None:
        self._progress, self._calls = progress, calls
        self._moves = -1
        self._since = 0.0

    def restart(self, now: float) -> None:
        """Measure from now on."""
        self._since = now

    def seconds(self, now: float) -> float:
        """Seconds, now."""
        moves = self._progress.beats + self._calls.moves
        if moves != self._moves:
            self._moves, self._since = moves, now
        return now - self._since


def _ended(picture: Picture) -> bool:
    return picture.heartbeat.phase == ENDED
