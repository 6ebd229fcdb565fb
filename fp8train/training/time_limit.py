"""``run.time_limit_minutes``: a run that ends itself before somebody else does.

The limit counts from the start of the process, so imports and building are part of it. At every step boundary
a rank asks whether one more step and a save still fit. How long they take is measured on the run itself:

* a step: the longest time from its batch to its boundary, evaluation included, without the first one, which
  compiles and warms up, as soon as there is another;
* a save: the longest one; until there was one, 16 bytes for each parameter, shared by the ranks, at 100 MB/s
  each.

A quarter is added to both. Ranks measure alone and agree as on any other stop request, so the first one that
sees no room ends the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from fp8train.comm.progress import Progress

_BYTES_PER_PARAMETER, _BYTES_PER_S = 16, 100e6
_RESERVE = 1.25


def process_age_s() -> float:
    """Seconds since this process was started, by the kernel; since now where it does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return max(0.0, age) if started else 0.0


def unmeasured_save_s(parameters: int, world_size: int) -> float:
    """Seconds that a save is expected to take before one was measured."""
    return parameters * _BYTES_PER_PARAMETER / (world_size * _BYTES_PER_S)


class TimeLimit:
    """Decides whether there is time for one more step.

    Attributes:
        minutes: ``run.time_limit_minutes``.
        save_seconds: how long a save takes, asked at every decision.
    """

    def __init__(self, minutes: float, *, age_s: float | None = None) -> None:
        """``age_s``: of the process; default: :func:`process_age_s`."""
        self.minutes = minutes
        self.save_seconds: Callable[[], float] = lambda: 0.0
        age_s = process_age_s() if age_s is None else age_s
        self._end = time.monotonic() + 60 * minutes - age_s
        self._began: float | None = None
        self._steps: list[float] = []  # the first, and the longest of the others

    def listen(self, progress: Progress) -> None:
        """Measure steps; a listener of :class:`~fp8train.comm.progress.Progress`."""
        if progress.phase == "data":
            self._began = progress.since
        elif progress.phase == "agree" and self._began is not None:
            took, self._began = progress.since - self._began, None
            self._steps = [*self._steps[:1], max([took, *self._steps[1:]])] if self._steps else [took]

    def reserve_s(self) -> float:
        """Seconds that one more step and a save are expected to take; 0 before the first step."""
        return _RESERVE * (self._steps[-1] + self.save_seconds()) if self._steps else 0.0

    def is_due(self) -> bool:
        """Whether one more step and a save do not fit."""
        return time.monotonic() + self.reserve_s() >= self._end
