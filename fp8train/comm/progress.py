"""Where this rank is in the run: the step, the phase of it, and when it came there.

The loop and the trainer say each phase as they enter it; that costs a comparison and a clock. Who wants to
know reads the attributes from another thread, or listens: a watchdog tells by them which rank the others
wait for, injected faults strike at them, a profiler begins and ends at them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, get_args

Phase = Literal[
    "start",
    "build",
    "restore",
    "data",
    "forward",
    "backward",
    "reduce",
    "optimizer",
    "report",
    "evaluate",
    "agree",
    "save",
    "end",
]
"""What a rank does at a moment, in the order of a step. ``forward`` of a pipeline is its whole schedule;
``reduce``: what is left of the gradients' reduction after backward, and their norm; ``agree``: whether to
stop; ``save``: in the main thread (an asynchronous save goes on in another)."""

PHASES: tuple[Phase, ...] = get_args(Phase)


class Progress:
    """The place of one rank; written by its main thread.

    Attributes:
        step: the step that is under way, 0-based; -1 before the first.
        phase: of it.
        since: when the phase began, on ``time.monotonic``.
        steps: steps that this process has begun.
        beats: grows with everything that is done; while it stands, nothing is.
        listeners: called with this object whenever a phase begins, in order, by the thread that entered it.
    """

    def __init__(self) -> None:
        self.step = -1
        self.phase: Phase = "start"
        self.since = time.monotonic()
        self.steps = self.beats = 0
        self.listeners: list[Callable[[Progress], None]] = []

    def enter(self, phase: Phase, *, step: int | None = None) -> None:
        """A phase begins, of ``step`` if that is a new one."""
        if step is not None:
            self.step = step
            self.steps += 1
        self.phase, self.since = phase, time.monotonic()
        self.beats += 1
        for listener in self.listeners:
            listener(self)

    def beat(self) -> None:
        """Some part of a long phase is done: another batch of an evaluation, a tensor of a checkpoint."""
        self.beats += 1
