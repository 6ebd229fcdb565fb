"""Stop requests: a signal, the file STOP or the time limit asks, all ranks agree at a step boundary, the run
saves and ends.

SIGTERM, SIGHUP (the terminal was closed), SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2 are recorded, never acted on
inside the handler: a step is not cut in half, and a signal that comes twice (torchrun and Slurm both forward
it) or during a save changes nothing. The requests of all ranks meet in one all-reduce of a byte per step, so
every rank leaves the loop at the same step, whichever of them was asked. A stop takes as long as the step
does: that is the price of not losing it.

A person's request (Ctrl-C, SIGHUP, STOP) ends a run as ``stopped``, a machine's as ``preempted``: that one is
to come back. Where both ask, the person wins.

Python runs signal handlers only between bytecodes of the main thread, which may be busy for minutes, in a
kernel or in a collective. The interpreter's own C handler writes a byte at once, though, and a thread here
waits for it: it answers a signal with what is going to happen, and it alone times Ctrl-C. A second one, at
least a second after the first, means "now": the main thread gets a KeyboardInterrupt, and if the process has
not ended five seconds later it is ended with status 130. Once the end of the run is on record (``settle``),
"now" is the status on record: what was saved does not become a failure because someone was impatient.

This is in force from before torch is imported until the process ends; so this module imports torch only where
ranks agree.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from fp8train.comm.failures import INTERRUPTED
from fp8train.run_dir.claim import RunDirGoneError
from fp8train.training.time_limit import TimeLimit

if TYPE_CHECKING:
    import torch.distributed as dist

SAME_CTRL_C_S = 1.0
"""SIGINTs closer than this are one Ctrl-C: the terminal and torchrun both deliver it."""

_UNWIND_S = 5.0
_WRITING_S = 0.1

_PREEMPTED = "preempted"
_STOP_FILE = "STOP file"
TIME_LIMIT = "time limit"
"""The reason of a run that stops by ``run.time_limit_minutes``."""


@dataclass(frozen=True)
class Stop:
    """A stop that all ranks agreed on. ``state`` and ``reason`` as in status.json."""

    state: Literal["stopped", "preempted"]
    reason: str


# The codes of the all-reduce, from 1; where ranks have different reasons the highest is reported.
_REASONS = (
    Stop("preempted", TIME_LIMIT),
    Stop("preempted", _STOP_FILE),
    Stop("preempted", "SIGUSR1"),
    Stop("preempted", "SIGUSR2"),
    Stop("preempted", "SIGTERM"),
    Stop("stopped", _STOP_FILE),
    Stop("stopped", "SIGHUP"),
    Stop("stopped", "SIGINT"),
)
_GONE = 255
_CODES = {one: code for code, one in enumerate(_REASONS, 1)}
_SIGNALS = {signal.Signals[one.reason]: code for one, code in _CODES.items() if one.reason[:3] == "SIG"}


class StopRequest:
    """Collects stop requests while it is entered (main thread only); restores the previous handlers on exit.

    Attributes:
        stop_file: rank 0 looks for it at every agreement; None for no such file.
        limit: every rank asks it at every agreement; None for no limit.
        gone: rank 0 asks at every agreement what has become of a run directory that it no longer holds.
        plan: what a stop that is asked for now leads to, for the answer to the one who asked.
        say: prints the answer; called from other threads. Answers nothing by default.
        on_quit: called before a process that does not end after the second Ctrl-C is ended; from another
            thread.
        quitting: a second Ctrl-C came; whatever fails from now on may be its consequence.
        settled: the exit status on record, once there is one.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.plan = "stopping before the first step"
        self.say: Callable[[str], None] | None = None
        self.on_quit: Callable[[], None] | None = None
        self.quitting = False
        self.limit: TimeLimit | None = None
        self.gone: Callable[[], str | None] = lambda: None
        self.settled: int | None = None
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
        self._code = max(self._code, _SIGNALS[signal.Signals(number)])
        if number == signal.SIGINT and self.quitting and not self._raised and self.settled is None:
            self._raised = True  # once: what unwinds is not cut short by a third
            raise KeyboardInterrupt

    @property
    def asked(self) -> bool:
        """Whether a signal asked this rank."""
        return self._code != 0

    def settle(self, exit_status: int, on_quit: Callable[[], None] | None = None) -> None:
        """The end of the run is on record with this exit status, or ``on_quit`` puts it there: from now on a
        second Ctrl-C ends the process at once, and with that status."""
        self.on_quit = on_quit
        self.settled = exit_status
        self.plan = "the run is over, ending"

    def agree(self, group: dist.ProcessGroup | None) -> Stop | None:
        """Whether to stop, and why: the same answer on every rank, but for what a STOP file says, which rank
        0 alone reads. Collective over ``group``.

        Args:
            group: gloo group over all ranks of the run; None for a single process.

        Returns:
            None to go on.

        Raises:
            RunDirGoneError: the run directory was deleted or replaced; on every rank.
        """
        first = group is None or _rank(group) == 0
        noted = _read_stop(self.stop_file) if first and self.stop_file is not None else None
        if noted is not None:
            self._code = max(self._code, _CODES[Stop(noted.state, _STOP_FILE)])
        if not self._code and self.limit is not None and self.limit.is_due():
            self._code = _CODES[Stop("preempted", TIME_LIMIT)]
        gone = self.gone() if first else None
        code = _GONE if gone is not None else self._code
        if group is not None:
            code = _highest(code, group)
        if code == _GONE:
            raise RunDirGoneError(gone or "the run directory was deleted or replaced")
        if not code:
            return None
        agreed = _REASONS[code - 1]
        return noted if noted is not None and agreed == Stop(noted.state, _STOP_FILE) else agreed

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
                    if self.settled is not None:
                        self._force(0.0)
                    self._answer("quitting now", patience_s=0.5)  # first: then the process may end at once
                    self.quitting = True
                    threading.Thread(target=self._force, args=(_UNWIND_S,), daemon=True).start()
                    signal.pthread_kill(main, signal.SIGINT)  # the handler may have run before the flag

    def _answer(self, text: str, *, patience_s: float = 0.0) -> None:
        """Say it from a thread of its own, and wait for that long: an output that nobody reads must not hold
        up the next signal."""
        if self.say is not None:
            speaker = threading.Thread(target=self.say, args=(text,), daemon=True)
            speaker.start()
            speaker.join(patience_s)

    def _force(self, patience_s: float) -> None:
        time.sleep(patience_s)
        try:
            if self.on_quit is not None:
                self.on_quit()
        finally:
            os._exit(INTERRUPTED if self.settled is None else self.settled)


def _rank(group: dist.ProcessGroup) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def _highest(code: int, group: dist.ProcessGroup) -> int:
    import torch
    import torch.distributed as dist

    shared = torch.tensor([code], dtype=torch.uint8)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    return int(shared)


def _read_stop(path: Path) -> Stop | None:
    """What the file asks for, if it is there: whatever is there, it asks. Where that cannot be known, the run
    goes on."""
    note = ""
    try:
        if not os.path.lexists(path):
            return None
        if path.is_file():
            if path.stat().st_size == 0:
                time.sleep(_WRITING_S)  # `echo preempted > STOP` makes it empty first
            with path.open(errors="replace") as stream:
                note = stream.readline(200).strip()
    except FileNotFoundError:
        return None
    except OSError:
        pass
    said = "".join(c if c.isprintable() else "?" for c in note.removeprefix(_PREEMPTED).lstrip(": "))
    reason = f"{_STOP_FILE} ({said})" if said else _STOP_FILE
    return Stop("preempted" if note.startswith(_PREEMPTED) else "stopped", reason)


def _answer_to(number: int, plan: str) -> str:
    if number == signal.SIGINT:
        return f"Ctrl-C: {plan}; Ctrl-C once more: quit now"
    return f"{signal.Signals(number).name}: {plan}"
