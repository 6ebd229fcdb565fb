"""What a person reads while a run goes on: one line per logged step, in a terminal, a log file or ``| grep``.

Colour (only for numbers that are not finite) is used on a terminal alone, and not with ``NO_COLOR`` set
(https://no-color.org) or ``TERM=dumb``. An output that goes away (a closed pipe, a full disk) never stops a
run: the numbers are in ``metrics.jsonl`` too.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import TextIO

_RED, _PLAIN = "\033[1;31m", "\033[0m"
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "k", "M", "G", "T", "P")


class Console:
    """Prints on rank 0, is silent elsewhere.

    Attributes:
        total_steps: the ``/N`` of a step line.
    """

    def __init__(self, *, enabled: bool, total_steps: int, stream: TextIO | None = None) -> None:
        """Print to ``stream``; default: stdout."""
        self.total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._colour = wants_colour(self._stream)

    def say(self, text: str) -> None:
        """Print text as it is, flushed."""
        if not self._enabled:
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            self._enabled = False
            _discard(self._stream)
        except OSError:
            pass  # a full disk behind a redirection; the next line may fit

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        mfu_peak: str | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Print the line of a logged step.

        Args:
            step: optimizer steps done.
            metrics: numbers by name; a column whose number is missing is left out.
            mfu_peak: what ``throughput/mfu`` is a share of, e.g. ``989 TFLOP/s H100 SXM BF16``.
            eta_s: seconds until the end.
        """
        self.say(
            step_line(
                step,
                self.total_steps,
                metrics,
                mfu_peak=mfu_peak,
                eta_s=eta_s,
                colour=self._colour,
            )
        )


def step_line(
    step: int,
    total_steps: int,
    metrics: Mapping[str, float],
    *,
    mfu_peak: str | None = None,
    eta_s: float | None = None,
    colour: bool = False,
) -> str:
    """The text of :meth:`Console.step`."""
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


def wants_colour(stream: TextIO) -> bool:
    """Whether ANSI codes belong on this stream."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


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
    if exponent == 0:
        digits = f"{value:.0f}"
    else:
        digits = (
            f"{value:.2f}"
            if abs(value) < 9.995
            else (f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}")
        )
    return f"{digits}{separator}{units[exponent]}"


def _discard(stream: TextIO) -> None:
    """Send what is still buffered to nowhere: at exit Python would try to flush it, and fail."""
    if stream is sys.stdout:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
