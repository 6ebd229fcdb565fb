"""Slow ranks: how long each takes for a step without waiting for the others.

All ranks end a step together, so the time of a step says nothing about one of them. On a CPU the host waits
in collectives, and what is left of a step without that is this rank's own: data, forward, backward, update.
On CUDA the host waits for nothing but the device, at one place for everything; so the device's clock is read
there, from the first forward to the end of backward, plus the time that data took. That holds what forward
and backward wait for inside: collectives of tensor parallelism, amaxes that casts agree on. **Unmeasured** on
several GPUs. Under DeepSpeed, whose collectives are not counted, there are no figures.

One number of each rank is gathered on logged steps, over the gloo group, and no device is waited for. A rank
is compared with those of its pipeline stage: other stages have other work.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fp8train.comm.calls import Calls
from fp8train.comm.processes import Processes
from fp8train.comm.progress import Progress

SLOW = 1.2
"""A rank is slow that takes this many times the median of its stage."""
PATIENCE = 5
"""Logged steps in a row until that is told."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that has been slow for some time.

    Attributes:
        rank: which.
        ratio: its seconds per step over the median of its stage.
    """

    rank: int
    ratio: float


class StepClock:
    """Measures this rank's own seconds of steps; a listener of its :class:`Progress`."""

    def __init__(self, progress: Progress, calls: Calls, device: torch.device) -> None:
        self._calls, self._on_cuda = calls, device.type == "cuda"
        self._began = self._waited = self._seconds = 0.0
        self._steps = 0
        self._first: torch.cuda.Event | None = None
        self._last: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        progress.listeners.append(self._entered)

    def take(self) -> float:
        """Mean seconds of the steps since the last call; 0 without any. Waits for no device that has been
        waited for since their end."""
        seconds, steps = self._seconds, self._steps
        seconds += sum(first.elapsed_time(last) for first, last in self._spans) / 1000
        self._seconds, self._steps, self._spans = 0.0, 0, []
        return seconds / max(1, steps)

    def _entered(self, progress: Progress) -> None:
        if progress.phase == "data":
            self._began, self._waited = progress.since, self._calls.waited_s
            self._first = None
        elif progress.phase == "report":
            self._steps += 1
            if self._first is not None and self._last is not None:
                self._spans.append((self._first, self._last))
            else:
                waited = self._calls.waited_s - self._waited
                self._seconds += progress.since - self._began - waited
        elif self._on_cuda and progress.phase == "forward" and self._first is None:
            self._seconds += progress.since - self._began
            self._first = self._mark()
        elif self._on_cuda and progress.phase == "reduce":
            self._last = self._mark()

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stragglers:
    """Compares the ranks of a run with each other, on logged steps."""

    def __init__(self, progress: Progress, processes: Processes, *, counted: bool) -> None:
        """Measure from now on. A single process is compared with nobody, nor are ranks whose collectives are
        not ``counted``."""
        self._processes = processes
        self._clock: StepClock | None = None
        if processes.control is not None and counted:
            self._clock = StepClock(progress, processes.calls, processes.device)
        self._last: list[float] = []
        self._slow: Counter[int] = Counter()

    def metrics(self) -> dict[str, float]:
        """Own seconds per step of all ranks since the last call, and the slowest. Collective."""
        if self._clock is None:
            return {}
        own = torch.tensor(self._clock.take(), dtype=torch.float64)
        everyone = [torch.zeros_like(own) for _ in range(self._processes.world_size)]
        with self._processes.control_calls.held("step times"):
            dist.all_gather(everyone, own, group=self._processes.control)
        self._last = [float(seconds) for seconds in everyone]
        return {
            "time/step_min_s": min(self._last),
            "time/step_median_s": statistics.median(self._last),
            "time/step_max_s": max(self._last),
            "time/slowest_rank": float(self._last.index(max(self._last))),
        }

    def newly_slow(self) -> list[SlowRank]:
        """Ranks that have been slow for :data:`PATIENCE` calls of :meth:`metrics` in a row; each is returned
        once. Call it after each of them."""
        if self._clock is None:
            return []
        processes = self._processes
        inner = processes.cp.size * processes.tp.size
        stages = [rank // inner % processes.pp.size for rank in range(processes.world_size)]
        ratios = ratios_to_stage(self._last, stages)
        found = []
        for rank, ratio in ratios.items():
            self._slow[rank] = self._slow[rank] + 1 if ratio >= SLOW else 0
            if self._slow[rank] == PATIENCE:
                found.append(SlowRank(rank, ratio))
        return found


def ratios_to_stage(seconds: Sequence[float], stages: Sequence[int]) -> Mapping[int, float]:
    """Seconds of each rank over the median of its stage (of an even number the lower one: of two ranks the
    faster is the measure)."""
    medians = {
        stage: statistics.median_low(s for s, at in zip(seconds, stages, strict=True) if at == stage)
        for stage in set(stages)
    }
    return {
        rank: seconds[rank] / medians[stage] if medians[stage] > 0 else 1.0
        for rank, stage in enumerate(stages)
    }
