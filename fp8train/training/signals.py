"""Stop requests: a signal or the file STOP asks, all ranks agree at a step boundary, the run saves and ends.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 are recorded, never acted on inside the handler: a step is not
cut in half, and a signal that comes twice (torchrun and Slurm both forward it) or during a save changes
nothing. The requests of all ranks meet in one all-reduce of a byte per step, so every rank leaves the loop at
the same step, whichever of them was asked.

A second Ctrl-C, at least a second after the first, means "now": KeyboardInterrupt is raised, and if Python
does not get to it within five seconds (the process waits in a collective) the process exits with status 130.
That takes a thread, because Python runs signal handlers only between bytecodes of the main thread. The price
of not losing the running step otherwise is that a stop takes as long as the step does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

EXIT_INTERRUPTED = 130
"""Exit status after the second Ctrl-C: 128 + SIGINT, as shells report it."""

SAME_CTRL_C_S = 1.0
"""SIGINTs closer than this are one Ctrl-C: the terminal and torchrun both deliver it."""

_UNWIND_S = 5.0

_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# Codes of the all-reduce; where ranks have different reasons the highest is reported.
_REASONS = ("", "STOP file", *(s.name for s in _SIGNALS))


class StopRequest:
    """Collects stop requests while it is entered (main thread only); restores the previous handlers on exit.

    Attributes:
        stop_file: rank 0 looks for it at every agreement; None for no such file.
    """

    def __init__(self, stop_file: Path | None) -> None:
        self.stop_file = stop_file
        self._code = 0
        self._first_interrupt: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup_fd = -1
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopRequest:
        reader, writer = self._wakeup = socket.socketpair()
        writer.setblocking(False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._previous = {s: signal.signal(s, self._record) for s in _SIGNALS}
        threading.Thread(target=_force_on_second_interrupt, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        assert self._wakeup is not None
        self._wakeup[1].close()  # ends the thread, which closes the other end

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._code = max(self._code, _REASONS.index(signal.Signals(number).name))
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt >= SAME_CTRL_C_S:
                raise KeyboardInterrupt

    @property
    def local_reason(self) -> str | None:
        """What this process was asked by, before any agreement."""
        return _REASONS[self._code] or None

    def agree(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> str | None:
        """Whether to stop, and why: the same answer on every rank. Collective over ``group``.

        Args:
            group: all ranks of the run; None for a single process.
            device: where the group reduces; default the CPU (gloo).

        Returns:
            ``STOP file``, the name of a signal, or None to go on.
        """
        rank = 0 if group is None else dist.get_rank(group)
        if not self._code and rank == 0 and self.stop_file is not None and self.stop_file.exists():
            self._code = _REASONS.index("STOP file")
        code = self._code
        if group is not None:
            shared = torch.tensor([code], dtype=torch.uint8, device=device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
            code = int(shared)
        return _REASONS[code] or None


def _force_on_second_interrupt(reader: socket.socket) -> None:
    """Exit with 130 five seconds after a second Ctrl-C, unless the process has ended by then.

    ``reader`` delivers the number of every signal as a byte, written by the interpreter's C handler; it ends
    when the other side is closed.
    """
    first: float | None = None
    with reader:
        while data := reader.recv(64):
            now = time.monotonic()
            if signal.SIGINT not in data:
                continue
            if first is None:
                first = now
            elif now - first >= SAME_CTRL_C_S:
                time.sleep(_UNWIND_S)
                os._exit(EXIT_INTERRUPTED)
