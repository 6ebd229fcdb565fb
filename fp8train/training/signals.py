"""Stop requests: a signal or the file STOP asks, all ranks agree at a step boundary, the run saves and ends.

SIGTERM, SIGHUP (the terminal was closed), SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 are recorded, never acted on
inside the handler: a step is not cut in half, and a signal that comes twice (torchrun and Slurm both forward
it) or during a save changes nothing. The requests of all ranks meet in one all-reduce of a byte per step, so
every rank leaves the loop at the same step, whichever of them was asked. A stop takes as long as the step
does: that is the price of not losing it.

Python runs signal handlers only between bytecodes of the main thread, which may be busy for minutes, in a
kernel or in a collective. The interpreter's own C handler writes a byte at once, though, and a thread here
waits for it: it answers a signal with what is going to happen, and it alone times Ctrl-C. A second one, at
least a second after the first, means "now": the main thread gets a KeyboardInterrupt, and if the process has
not ended five seconds later it is ended with status 130.

This is in force from before torch is imported until the run's process groups are gone; so this module
imports torch only where ranks agree.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fp8train.comm.failures import INTERRUPTED

if TYPE_CHECKING:
    import torch.distributed as dist

SAME_CTRL_C_S = 1.0
"""SIGINTs closer than this are one Ctrl-C: the terminal and torchrun both deliver it."""

_UNWIND_S = 5.0

_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# Codes of the all-reduce; where ranks have different reasons the highest is reported.
_REASONS = ("", "STOP file", *(s.name for s in _SIGNALS))


class StopRequest:
    """Collects stop requests while it is entered (main thread only); restores the previous handlers on exit.

    Attributes:
        stop_file: rank 0 looks for it at every agreement; None for no such file.
        plan: what a stop that is asked for now leads to, for the answer to the one who asked.
        say: prints the answer; called from other threads. Answers nothing by default.
        on_quit: called before a process that does not end after the second Ctrl-C is ended; from another
            thread.
        quitting: a second Ctrl-C came; whatever fails from now on may be its consequence.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.plan = "stopping before the first step"
        self.say: Callable[[str], None] | None = None
        self.on_quit: Callable[[], None] | None = None
        self.quitting = False
        self._raised = False
        self._code = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup_fd = -1
        self._wakeup: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> StopRequest:
        reader, writer = self._wakeup = socket.socketpair()
        writer.setblocking(False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        main = threading.get_ident()
        threading.Thread(target=self._watch, args=(reader, main), daemon=True).start()
        for number in sorted(_SIGNALS):  # SIGTERM is last: launch/torchrun.sh looks for it
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the run is to outlive its terminal
            self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        assert self._wakeup is not None
        self._wakeup[1].close()  # ends the thread, which closes the other end

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._code = max(self._code, _REASONS.index(signal.Signals(number).name))
        if number == signal.SIGINT and self.quitting and not self._raised:
            self._raised = True  # once: what unwinds is not cut short by a third
            raise KeyboardInterrupt

    def agree(self, group: dist.ProcessGroup | None) -> str | None:
        """Whether to stop, and why: the same answer on every rank. Collective over ``group``.

        Args:
            group: gloo group over all ranks of the run; None for a single process.

        Returns:
            ``STOP file``, the name of a signal, or None to go on.
        """
        import torch
        import torch.distributed as dist

        rank = 0 if group is None else dist.get_rank(group)
        if not self._code and rank == 0 and self.stop_file is not None and self.stop_file.exists():
            self._code = _REASONS.index("STOP file")
        code = self._code
        if group is not None:
            shared = torch.tensor([code], dtype=torch.uint8)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
            code = int(shared)
        return _REASONS[code] or None

    def _watch(self, reader: socket.socket, main: int) -> None:
        """Answer signals and time Ctrl-C.

        ``reader`` delivers the number of every signal as a byte; it ends when the other side is closed.
        ``main`` is the thread to interrupt.
        """
        first: float | None = None
        answered: set[bool] = set()
        with reader:
            while data := reader.recv(64):
                now = time.monotonic()
                for number in sorted(set(data) & set(_SIGNALS)):
                    ctrl_c = number == signal.SIGINT
                    if ctrl_c not in answered:  # one answer to Ctrl-C, one to all other signals
                        answered.add(ctrl_c)
                        self._answer(_answer_to(number, self.plan))
                if signal.SIGINT not in data or self.quitting:
                    continue
                if first is None:
                    first = now
                elif now - first >= SAME_CTRL_C_S:
                    self._answer("quitting now", patience_s=0.5)  # first: then the process may end at once
                    self.quitting = True
                    threading.Thread(target=self._force, daemon=True).start()
                    signal.pthread_kill(main, signal.SIGINT)  # the handler may have run before the flag

    def _answer(self, text: str, *, patience_s: float = 0.0) -> None:
        """Say it from a thread of its own, and wait for that long: an output that nobody reads must not hold
        up the next signal."""
        if self.say is not None:
            speaker = threading.Thread(target=self.say, args=(text,), daemon=True)
            speaker.start()
            speaker.join(patience_s)

    def _force(self) -> None:
        time.sleep(_UNWIND_S)
        try:
            if self.on_quit is not None:
                self.on_quit()
        finally:
            os._exit(INTERRUPTED)


def _answer_to(number: int, plan: str) -> str:
    if number == signal.SIGINT:
        return f"Ctrl-C: {plan}; Ctrl-C once more: quit now"
    return f"{signal.Signals(number).name}: {plan}"
