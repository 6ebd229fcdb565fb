"""Shows the progress of a long evaluation: a line on stderr now and then."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A line on stderr every few seconds, on the first rank.

    Args:
        label: what is running.
        total: units of work of this rank.
        unit: their name.
        quiet: print nothing.
    """

    def __init__(self, label: str, total: int, *, unit: str = "batches", quiet: bool = False) -> None:
        self._label, self._total, self._unit, self._quiet = label, total, unit, quiet
        self._done = self._tokens = 0
        self._began = self._last = time.monotonic()

    def advance(self, tokens: int) -> None:
        """One more unit is done, or under way."""
        self._done, self._tokens, now = self._done + 1, self._tokens + tokens, time.monotonic()
        if self._quiet or now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        speed = self._tokens / (now - self._began)
        line = f"{self._label}: {self._done} of {self._total} {self._unit}, {speed:,.0f} tokens/s"
        print(line, file=sys.stderr, flush=True)
