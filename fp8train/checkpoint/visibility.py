"""Waits until a rank sees what another one wrote.

On a network file system a machine may go on for seconds with what it remembers of a directory: a name that
rank 0 has just made is not there yet, or an old file is. So after each step that others build on, every rank
looks until it sees it, for a limited time by its own clock: no two machines' clocks are compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.ranks import Ranks


def size_now(path: Path) -> int | None:
    """Bytes of a file or a directory, None if it is not there. The directory that holds it is listed first,
    which makes NFS ask its server."""
    try:
        os.listdir(path.parent)
        return path.stat().st_size
    except OSError:  # not there, or no more what it was (ESTALE)
        return None


def read_now(path: Path) -> bytes | None:
    """Content of a small file, likewise."""
    try:
        os.listdir(path.parent)
        return path.read_bytes()
    except OSError:
        return None


@dataclass(frozen=True)
class View:
    """What a rank sees of the file system, and how patient it is."""

    timeout_s: float = 60.0
    """``checkpoint.visibility_timeout_s``."""
    size: Callable[[Path], int | None] = size_now
    """How it looks for a file or a directory."""
    read: Callable[[Path], bytes | None] = read_now
    """How it looks into a small file."""

    def wait(self, path: Path, rank: int, seen: Callable[[], bool]) -> None:
        """Return once this rank sees ``path`` as it should be, which ``seen`` says.

        Raises:
            CheckpointError: it does not within the time.
        """
        deadline, pause = time.monotonic() + self.timeout_s, 0.01
        while not seen():
            if time.monotonic() >= deadline:
                state = "does not see it" if self.size(path) is None else "sees an old state of it"
                raise CheckpointError(
                    f"{path}: rank {rank} {state}, {self.timeout_s:g} s after it was written; all ranks need "
                    "one file system. If that one is slow to show new files, raise `visibility_timeout_s`"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


LOCAL = View()
"""A file system as it is, with the default patience."""


def await_all(path: Path, ranks: Ranks, view: View) -> None:
    """Wait on every rank until it sees the file ``path`` as rank 0 does, if rank 0 does; collective."""
    digest = ranks.first(lambda: _digest(view.read(path)))
    if digest is not None:
        ranks.agree(lambda: view.wait(path, ranks.rank, lambda: _digest(view.read(path)) == digest))


def _digest(content: bytes | None) -> str | None:
    return None if content is None else sha256(content).hexdigest()
