"""The section ``profile``: torch's profiler over a window of steps, and what it saw as a trace.

The profiler listens to the run's :class:`~fp8train.comm.progress.Progress`. It begins with the first phase
of the window's first step and ends where the step after the last one begins, so that what happens between
steps (report, evaluation, agreement, save) is in it. Every step and every phase is a span of its own, by the
names of :data:`~fp8train.comm.progress.PHASES`: ``step 12``, ``forward``. Before the window a phase costs one
comparison, after it nothing; within it, times are those of a profiled run, and the clock of throughput
stands still only while the trace is written.

A trace that cannot be written is a warning; training goes on.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fp8train.checkpoint.errors import explain_os_error
from fp8train.comm.progress import Progress
from fp8train.config.profile_schema import ProfileConfig
from fp8train.files import TMP_SUFFIX
from fp8train.live.reporter import Reporter

if TYPE_CHECKING:
    from types import TracebackType

PROFILE_DIR = "profile"
"""In the run directory: traces of steps, and snapshots of memory."""

_ALLOCATIONS = 1_000_000
"""Of CUDA memory that are remembered, the newest."""
_logger = logging.getLogger(__name__)


def profiling(
    settings: ProfileConfig, directory: Path, progress: Progress, reporter: Reporter, *, rank: int
) -> AbstractContextManager[object]:
    """While it is entered, the steps that ``settings`` ask for are recorded, if they ask this rank; traces
    go to ``directory``."""
    if settings.start is None or rank not in settings.ranks:
        return ExitStack()
    return StepProfile(settings, directory, progress, reporter, rank=rank)


class StepProfile:
    """Records the steps from ``settings.start`` to ``settings.stop``."""

    def __init__(
        self, settings: ProfileConfig, directory: Path, progress: Progress, reporter: Reporter, *, rank: int
    ) -> None:
        assert settings.start is not None and settings.stop is not None
        self._first, self._last = settings.start, settings.stop
        self._directory, self._progress, self._reporter, self._rank = directory, progress, reporter, rank
        self._memory = settings.memory
        self._profiler: profile | None = None
        self._began = 0
        self._step, self._phase = ExitStack(), ExitStack()
        self._open = ""  # the phase whose span is open

    def __enter__(self) -> StepProfile:
        self._progress.listeners.append(self._entered)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A window that is cut short is written as far as it came, unless a second Ctrl-C cut it."""
        if self._profiler is not None and kind is not KeyboardInterrupt:
            self._end(self._progress.step + 1)
        self._leave()

    def _entered(self, progress: Progress) -> None:
        done = progress.step + 1  # of the step under way, from 1
        if progress.phase == "data":
            if self._profiler is not None and done > self._last:
                self._end(done - 1)
            if done > self._last:
                self._leave()
                return
            if done < self._first:
                return
            if self._profiler is None:
                self._begin(done)
            self._phase.close()
            self._step.close()
            self._step.enter_context(record_function(f"step {done}"))
            self._open = ""
        if self._profiler is not None and progress.phase != self._open:
            self._phase.close()
            self._phase.enter_context(record_function(progress.phase))
            self._open = progress.phase

    def _leave(self) -> None:
        if self._entered in self._progress.listeners:
            # A new list: this one may be gone through right now.
            self._progress.listeners = [one for one in self._progress.listeners if one != self._entered]

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            if self._memory:
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._began = step
        self._profiler = profile(activities=activities, profile_memory=self._memory)
        self._profiler.start()

    def _end(self, step: int) -> None:
        """Stop after ``step`` and write what was recorded."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        path = self._directory / f"rank{self._rank}_steps{self._began}-{step}.json.gz"
        with self._reporter.throughput.excluded():
            self._phase.close()
            self._step.close()
            profiler.stop()
            try:
                self._directory.mkdir(exist_ok=True)
                # Named so that torch compresses it, and a trace that is there is whole.
                draft = path.with_name(f".{path.name}{TMP_SUFFIX}.gz")
                profiler.export_chrome_trace(str(draft))
                draft.rename(path)
                if self._memory and torch.cuda.is_available():
                    snapshot = path.with_name(path.name.replace("json.gz", "pickle"))
                    torch.cuda.memory._dump_snapshot(str(snapshot))
                    torch.cuda.memory._record_memory_history(enabled=None)
            except OSError as error:
                _logger.warning("no trace of steps %d to %d: %s", self._began, step, explain_os_error(error))
                return
        self._reporter.event("profile", step=step, path=str(path))
        self._reporter.say(f"step {step}: trace of steps {self._began} to {step} in {path}")
