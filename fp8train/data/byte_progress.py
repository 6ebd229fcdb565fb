"""Progress in bytes: a bar for a person, a line every few seconds for a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Shows the progress of work on ``total`` bytes; a context manager.

    Args:
        label: What is going on.
        total: Bytes in all.
        stream: Where to write (default: standard error). A terminal gets a bar, anything else plain lines.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._stream = stream or sys.stderr
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if self._stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(file=self._stream))
            self._task = self._bar.add_task(label, total=total)

    def advance(self, count: int) -> None:
        """Count ``count`` more bytes as done, and show it if it is time."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = self._done / self._total if self._total else 1.0
            print(f"{self._label}: {share:.0%} of {self._total / 1e6:.1f} MB", file=self._stream, flush=True)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
