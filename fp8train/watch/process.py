"""Processes of this machine, through ``/proc``: who one is, whether it is stopped, and ending it.

A pid alone names nobody for long, and in a container it names another process than outside. So an identity
has the boot of the machine, the namespace of pids and the moment of the start too; who differs in one of
these is somebody else or somewhere else, and nothing is said about it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["runs", "stopped", "gone"]

_ABORT_S = 0.5


@dataclass(frozen=True)
class Identity:
    """A process, beyond doubt.

    Attributes:
        host: name of its machine.
        pid: its number there.
        place: boot of the machine and namespace of pids; empty where ``/proc`` does not tell.
        started: when, in clock ticks after the boot.
    """

    host: str
    pid: int
    place: str
    started: int

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


def own_identity() -> Identity:
    """Who this process is."""
    place, started = "", 0
    with suppress(OSError, ValueError, IndexError):
        started = int(_stat(os.getpid())[19])
        place = _place()
    return Identity(socket.gethostname(), os.getpid(), place, started)


def state_of(process: Identity) -> State | None:
    """``stopped`` by a signal, ``gone`` (ended, or a zombie), ``runs`` (or a debugger holds it), or None: it
    cannot be seen from here."""
    try:
        if not process.place or process.place != _place():
            return None
        fields = _stat(process.pid)
        if int(fields[19]) != process.started:
            return "gone"
    except FileNotFoundError:
        return "gone"
    except (OSError, ValueError, IndexError):
        return None
    states: dict[str, State] = {"T": "stopped", "Z": "gone", "X": "gone"}
    return states.get(fields[0], "runs")


def kill(process: Identity) -> None:
    """End a process of this machine that does not run: no other signal reaches it. One that merely does not
    answer is told to abort first, so that ``faulthandler`` can write what it is at. Never raises."""
    state = state_of(process)
    if state == "gone" or not process.place or process.pid == os.getpid():
        return
    with suppress(OSError):
        if process.place != _place():
            return
        if state != "stopped":
            os.kill(process.pid, signal.SIGABRT)
            time.sleep(_ABORT_S)
            if state_of(process) == "gone":
                return
        os.kill(process.pid, signal.SIGKILL)


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the third on; the second, a name, may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
