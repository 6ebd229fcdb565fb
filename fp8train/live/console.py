"""What a person reads while a run goes on: one line per logged step, in a terminal, a log file or ``| grep``.

On a terminal alone, and not with ``TERM=dumb``, there is a live line too, which every step between two logged
ones may replace. It stands in the row below the cursor, and the cursor's own row is left empty: what
libraries and other processes print lands there whole, instead of on top of it. Whoever prints here clears it
first. Colour (only for numbers that are not finite) is likewise for terminals, and not with ``NO_COLOR`` set
(https://no-color.org). An output that goes away (a closed pipe or terminal, a full disk) never stops a run:
the numbers are in ``metrics.jsonl`` too.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

LIVE_INTERVAL_S = 0.25
"""Seconds between two live lines, at least."""

_RED, _PLAIN = "\033[1;31m", "\033[0m"
_CLEAR = "\r\033[J"  # from the start of the cursor's row to the end of the screen
_UP = "\033[A\r"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "k", "M", "G", "T", "P")


class Console:
    """Prints on rank 0, is silent elsewhere; may be used from any thread. As a context manager it clears the
    live line at the end.

    Attributes:
        colour: whether it belongs on the stream.
    """

    def __init__(self, *, enabled: bool, stream: TextIO | None = None) -> None:
        """Print to ``stream``; default: stdout."""
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = terminal and not os.environ.get("NO_COLOR")
        self._live = enabled and terminal
        self._shown = False
        self._next_live = 0.0
        self._lock = threading.RLock()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def say(self, text: str) -> None:
        """Print text as it is, flushed."""
        with self._alone():
            self._print(f"{self._cleared()}{text}\n")

    def live_is_due(self) -> bool:
        """Whether there is a live line and the last one is old enough to be replaced."""
        return self._live and time.monotonic() >= self._next_live

    def live(self, text: str) -> None:
        """Show text, cut to the width of the terminal, until anything else is printed; nothing where
        :meth:`live_is_due` says no."""
        if not self.live_is_due():
            return
        self._next_live = time.monotonic() + LIVE_INTERVAL_S
        with self._alone():
            before = self._cleared()
            self._shown = True
            self._print(f"{before}\n{text[: _columns(self._stream) - 1]}{_UP}")

    def clear(self) -> None:
        """Remove the live line, for something that is printed elsewhere."""
        with self._alone():
            self._print(self._cleared())

    def _cleared(self) -> str:
        shown, self._shown = self._shown, False
        return _CLEAR if shown else ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Other threads wait, but not for long: one that is stuck on its output holds up nobody else."""
        mine = self._lock.acquire(timeout=1.0)
        try:
            yield
        finally:
            if mine:
                self._lock.release()

    def _print(self, text: str) -> None:
        if self._enabled and text and not print_safely(text, self._stream):
            self._enabled = self._live = False


def step_line(
    step: int,
    total_steps: int,
    metrics: Mapping[str, float],
    *,
    mfu_peak: str | None = None,
    eta_s: float | None = None,
    colour: bool = False,
) -> str:
    """The line of a logged step.

    Args:
        step: optimizer steps done.
        total_steps: of the run.
        metrics: numbers by name; a column whose number is missing is left out.
        mfu_peak: what ``throughput/mfu`` is a share of, e.g. ``989 TFLOP/s H100 SXM BF16``.
        eta_s: seconds until the end.
        colour: numbers that are not finite are red.
    """
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]

    def add(name: str, template: str, shown: str) -> None:
        value = metrics[name]
        text = template.format(shown if math.isfinite(value) else str(value))
        parts.append(f"{_RED}{text}{_PLAIN}" if colour and not math.isfinite(value) else text)

    for name, template, show in (
        ("train/loss_mean", "loss {}", "{:.4f}".format),
        ("optim/grad_norm", "grad norm {}", "{:.3f}".format),
        ("optim/lr", "lr {}", "{:.2e}".format),
        ("throughput/tokens_per_second_per_device", "{} tok/s/device", format_count),
        ("throughput/tflops_per_device", "{} TFLOP/s", "{:.3g}".format),
        ("throughput/mfu", f"MFU {{}} of {mfu_peak}", format_percent),
        ("memory/peak_bytes", "mem {}", format_bytes),
        ("fp8/saturated", "FP8 over {}", format_percent),
        ("fp8/flushed", "under {}" if "fp8/saturated" in metrics else "FP8 under {}", format_percent),
    ):
        if name in metrics:
            add(name, template, show(metrics[name]) if math.isfinite(metrics[name]) else "")
    if eta_s is not None:
        parts.append(f"ETA {format_duration(eta_s)}")
    return " | ".join(parts)


def live_line(
    step: int,
    total_steps: int,
    *,
    loss: float,
    loss_step: int,
    tokens_per_second: float,
    eta_s: float,
) -> str:
    """The text of a live line.

    Args:
        step: optimizer steps done.
        total_steps: of the run.
        loss: the newest that the host knows.
        loss_step: the step that it belongs to.
        tokens_per_second: over all devices.
        eta_s: seconds until the end.
    """
    at = "" if loss_step == step else f" at step {loss_step}"
    return (
        f"step {step:>{len(str(total_steps))}}/{total_steps} | loss {loss:.4f}{at} | "
        f"{format_count(tokens_per_second)} tok/s | ETA {format_duration(eta_s)}"
    )


def print_safely(text: str, stream: TextIO) -> bool:
    """Write and flush; whether the stream is still there. One that is not (a closed pipe or terminal) is
    replaced by nothing, a full disk only loses the text."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            _discard(stream)
            return False
    return True


def leave_safely(stream: TextIO) -> None:
    """Flush for the last time. What still cannot be written is dropped: Python would try again at exit, and
    end with a status of its own (120)."""
    try:
        stream.flush()
    except (OSError, ValueError):
        _discard(stream)


def format_count(value: float) -> str:
    """Three digits and a decimal prefix: 950, 12.3k, 1.50M."""
    return _scaled(value, 1000, _DECIMAL, separator="")


def format_bytes(value: float) -> str:
    """Three digits and a binary unit: 512 B, 41.2 GiB."""
    return _scaled(value, 1024, _BINARY, separator=" ")


def format_percent(share: float) -> str:
    """A share of one as percent; small ones keep two digits, and only 0 is shown as 0."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "<0.01%"
    return f"{percent:.2f}%" if percent < 10 else f"{percent:.1f}%"


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 3m20s, 1h02m, 2d03h; ``?`` where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    left = max(0, round(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m{left % 60:02d}s"
    if left < 86400:
        return f"{left // 3600}h{left % 3600 // 60:02d}m"
    return f"{left // 86400}d{left % 86400 // 3600:02d}h"


def _scaled(value: float, base: int, units: tuple[str, ...], *, separator: str) -> str:
    exponent = 0
    # 999.5 would round to the four digits 1000 of a smaller unit
    while abs(value) >= 999.5 and exponent < len(units) - 1:
        value /= base
        exponent += 1
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals if exponent else 0}f}{separator}{units[exponent]}"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def _discard(stream: TextIO) -> None:
    """Send what is still buffered to nowhere: at exit Python would try to flush it, and fail."""
    if stream in (sys.stdout, sys.stderr):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
