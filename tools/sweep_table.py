"""Best learning rate by width: the table and plot of a hyper-parameter transfer study.

A parametrisation *transfers* the learning rate if the best one does not move as the model gets wider (Yang
et al. 2022, arXiv 2203.03466; u-μP, arXiv 2407.17465, figure 1). The loss near its optimum is close to a
parabola in log2(lr), so the optimum is read off the parabola through the three best points of the grid,
which resolves it far below the grid's spacing. It counts only if it is convex and its vertex lies no further
from the best point than that point's neighbours, of which one that diverged does not count; otherwise the
best grid point stands. The slope of log2(best lr) over log2(width) sums an arm up: 0 for perfect transfer,
about -1 for Adam under the standard parametrisation.

A *sweep* is ``{arm: {width: {lr: loss}}}``, where an infinite loss is a run that diverged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Losses = Mapping[float, float]
Sweep = Mapping[str, Mapping[int, Losses]]


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one width, and how it was found.

    Attributes:
        lr: of the parabola's vertex, or of the best grid point.
        loss: there.
        grid_lr: the best grid point.
        grid_loss: there.
        kind: ``parabola``; ``grid`` where there is no usable parabola; ``edge`` where the best point is the
            first or last of the grid, so that the optimum may lie beyond.
    """

    lr: float
    loss: float
    grid_lr: float
    grid_loss: float
    kind: Literal["parabola", "grid", "edge"]


def find_optimum(losses: Losses) -> Optimum | None:
    """The optimum of ``{lr: loss}``; None if every run diverged."""
    finite = sorted((loss, lr) for lr, loss in losses.items() if math.isfinite(loss))
    if not finite:
        return None
    grid_loss, grid_lr = finite[0]
    if grid_lr in (min(losses), max(losses)):
        return Optimum(grid_lr, grid_loss, grid_lr, grid_loss, "edge")
    vertex = _vertex(sorted((math.log2(lr), loss) for loss, lr in finite[:3])) if len(finite) > 2 else None
    rates = sorted(losses)
    place = rates.index(grid_lr)
    low, high = (lr if math.isfinite(losses[lr]) else grid_lr for lr in (rates[place - 1], rates[place + 1]))
    if vertex is None or not math.log2(low) <= vertex[0] <= math.log2(high):
        return Optimum(grid_lr, grid_loss, grid_lr, grid_loss, "grid")
    return Optimum(2.0 ** vertex[0], vertex[1], grid_lr, grid_loss, "parabola")


def _vertex(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Lowest point of the parabola through three points in ascending order; None if it is not convex."""
    (x0, y0), (x1, y1), (x2, y2) = points
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)  # Newton's divided differences
    curvature = (second - first) / (x2 - x0)
    if curvature <= 0:
        return None
    x = (x0 + x1) / 2 - first / (2 * curvature)
    return x, y0 + first * (x - x0) + curvature * (x - x0) * (x - x1)


def transfer_slope(optima: Mapping[int, Optimum | None]) -> float | None:
    """Least-squares slope of log2(best lr) over log2(width); None with fewer than two widths."""
    points = [(math.log2(width), math.log2(best.lr)) for width, best in optima.items() if best is not None]
    if len(points) < 2:
        return None
    return float(np.polyfit([x for x, _ in points], [y for _, y in points], 1)[0])


def sweep_table(sweep: Sweep) -> str:
    """Markdown: per arm, a row per width and a column per learning rate; the best of a row in bold."""
    parts = []
    for arm, widths in sweep.items():
        rates = sorted({lr for losses in widths.values() for lr in losses})
        optima = {width: find_optimum(losses) for width, losses in widths.items()}
        heading = ["width", *map(format_lr, rates), "best on the grid", "best, parabola"]
        rows = []
        for width, losses in widths.items():
            best = optima[width]
            cells = [_cell(losses.get(lr), bold=best is not None and lr == best.grid_lr) for lr in rates]
            rows.append([str(width), *cells, *_optimum_cells(best)])
        slope = transfer_slope(optima)
        text = "" if slope is None else f"\n\nslope of log2(best lr) over log2(width): {_signed(slope)}"
        edges = sum(best is not None and best.kind == "edge" for best in optima.values())
        if text and edges:
            text += f" (not to be trusted: {edges} of {len(optima)} optima at the edge of the grid)"
        parts.append(f"### {arm}\n\n{markdown_table(heading, rows)}{text}")
    return "\n\n".join(parts)


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Padded so that its source is readable too; the first column aligned left, the others right."""
    widths = [max(3, *map(len, column)) for column in zip(heading, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (heading, rule, *rows):
        padded = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def _signed(slope: float) -> str:
    return f"{round(slope, 2) + 0.0:+.2f}"  # no -0.00


def _cell(loss: float | None, *, bold: bool) -> str:
    if loss is None:
        return ""
    if not math.isfinite(loss):
        return "diverged"
    return f"**{loss:.4f}**" if bold else f"{loss:.4f}"


def _optimum_cells(best: Optimum | None) -> list[str]:
    if best is None:
        return ["-", "-"]
    notes = {"edge": "edge of the grid", "grid": "no parabola"}
    parabola = notes.get(best.kind) or f"2^{math.log2(best.lr):.2f} ({best.loss:.4f})"
    return [format_lr(best.grid_lr), parabola]


def format_lr(lr: float) -> str:
    """``2^-9`` where the exponent is a short number, else three digits."""
    exponent = math.log2(lr)
    return f"2^{exponent:g}" if abs(exponent - round(exponent, 2)) < 1e-9 else f"{lr:.3g}"


def plot_sweep(sweep: Sweep, path: Path, *, title: str, loss: str) -> None:
    """A panel per arm: loss over log2(lr), a line per width, optima marked.

    Args:
        sweep: what to draw.
        path: of the PNG.
        title: above the panels.
        loss: what the loss is, for the y-axis.
    """
    figure = Figure(figsize=(max(4.4 * len(sweep), 6.0), 4.4), layout="constrained")
    axes = figure.subplots(1, len(sweep), squeeze=False, sharey=True)[0]
    widths = sorted({width for arm in sweep.values() for width in arm})
    place = LogNorm(widths[0], max(widths[-1], 2 * widths[0]))
    for panel, (arm, curves) in zip(axes, sweep.items(), strict=True):
        for width, losses in sorted(curves.items()):
            _draw_curve(panel, width, losses, matplotlib.colormaps["viridis"](0.9 * float(place(width))))
        slope = transfer_slope({width: find_optimum(losses) for width, losses in curves.items()})
        panel.set_title(arm if slope is None else f"{arm} (slope of the optimum {_signed(slope)})")
        panel.set_xlabel("log2 of the learning rate")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(loss)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
    figure.suptitle(f"{title} (star: optimum; cross: diverged)")
    figure.savefig(path, dpi=110)


def _draw_curve(panel: Axes, width: int, losses: Losses, color: tuple[float, float, float, float]) -> None:
    finite = [(math.log2(lr), loss) for lr, loss in sorted(losses.items()) if math.isfinite(loss)]
    x, y = [point[0] for point in finite], [point[1] for point in finite]
    panel.plot(x, y, marker="o", markersize=4, color=color, label=f"width {width}")
    lost = [math.log2(lr) for lr, loss in losses.items() if not math.isfinite(loss)]
    in_axes = panel.get_xaxis_transform()  # diverged runs have no loss: they stand at the upper edge
    panel.plot(lost, [0.98] * len(lost), linestyle="", marker="x", color=color, transform=in_axes)
    best = find_optimum(losses)
    if best is not None:
        at = [math.log2(best.lr)], [best.loss]
        panel.plot(
            *at, linestyle="", marker="*", markersize=13, color=color, markeredgecolor="black", zorder=5
        )
