"""Loss against one constant FP8 scale: the window of exponents that serve, and its plot.

See ``tools/cscale_window.py``, which measures the losses. A *result* is what it writes to ``cscale.json``:
``high_precision``, ``amax`` (losses in nats per token), ``tolerance``, ``name``, ``step`` and ``sweeps``:
``{operands: {losses: {exponent: loss}, window: [low, high] or null, text}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fp8train.reporting.text_table import text_table

_COLORS = {"both": "#0072b2", "x": "#e69f00", "w": "#009e73"}


@dataclass(frozen=True)
class Window:
    """Neighbouring exponents ``low .. high`` whose loss is good enough; ``open_end`` where the sweep ended
    before the window did."""

    low: int
    high: int
    open_end: bool

    def __str__(self) -> str:
        note = " (to the end of the sweep: it may be wider; see --exponents)" if self.open_end else ""
        return f"k = {self.low} .. {self.high}, {self.high - self.low + 1} powers of two{note}"


def find_window(losses: Mapping[int, float], reference: float, tolerance: float) -> Window | None:
    """The longest run of consecutive exponents with ``loss <= reference · (1 + tolerance)``, the first of
    equally long ones; None if there is none. A loss that is NaN is never good enough."""
    good = [k for k in sorted(losses) if losses[k] <= reference * (1 + tolerance)]
    runs: list[list[int]] = []
    for k in good:
        if runs and k == runs[-1][-1] + 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    if not runs:
        return None
    longest = max(runs, key=len)
    return Window(longest[0], longest[-1], longest[0] == min(losses) or longest[-1] == max(losses))


def plot_windows(result: Mapping[str, Any], path: Path) -> None:
    """Loss against the exponent, with the reference and the windows."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    reference, limit = result["high_precision"], result["high_precision"] * (1 + result["tolerance"])
    axes.axhline(reference, color="black", linewidth=1, label="high precision")
    axes.axhline(limit, color="black", linewidth=0.8, linestyle=":", label=f"+ {result['tolerance']:.1%}")
    axes.axhline(result["amax"], color="#888888", linewidth=1, linestyle="--", label="FP8, scales from amax")
    names = {"both": "x and w", "x": "x alone", "w": "w alone"}
    for operands, sweep in result["sweeps"].items():
        exponents = sorted(map(int, sweep["losses"]))
        losses = [float(sweep["losses"][str(k)]) for k in exponents]
        color = _COLORS[operands]
        axes.plot(
            exponents, losses, marker="o", markersize=4, color=color, label=f"constant, {names[operands]}"
        )
        if sweep["window"] is not None:
            low, high = sweep["window"]
            axes.axvspan(low - 0.5, high + 0.5, color=color, alpha=0.12, linewidth=0)
    axes.set_title(f"{result['name']}, step {result['step']}: constant FP8 scale (shaded: the window)")
    axes.set_xlabel("k: values are multiplied by 2^k before the cast")
    axes.set_ylabel("validation loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def summary(result: Mapping[str, Any]) -> str:
    """The losses side by side and the windows."""
    sweeps = result["sweeps"]
    exponents = next(iter(sweeps.values()))["losses"]
    rows = [[k, *(f"{float(one['losses'][k]):.4f}" for one in sweeps.values())] for k in exponents]
    lines = [text_table(["k", *sweeps], rows, left=0), ""]
    limit = f"at most {result['tolerance']:.1%} above {result['high_precision']:.4f}"
    lines += [f"window for {operands}, {limit}: {one['text']}" for operands, one in sweeps.items()]
    return "\n".join(lines)
