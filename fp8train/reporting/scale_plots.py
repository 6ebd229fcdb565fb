"""Plots of ``fp8train report scales``; after the figures of Perez et al. 2023 (arXiv 2309.17224).

Rows of panels are operands, columns linear types, and a row shares its y-axis, so that both can be compared
by eye. Figures are drawn without pyplot: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fp8train.reporting.scale_series import OPERANDS, Series, moments

DPI = 110
_MOMENTS = {"start": ("#440154", "o"), "middle": ("#21918c", "s"), "end": ("#e8860c", "^")}
_LINEARS = {"qkv": "#0072b2", "out": "#e69f00", "up": "#009e73", "down": "#cc79a7"}
_OTHER = "#555555"


def plot_training(series: Sequence[Series], folder: Path, *, title: str) -> list[Path]:
    """Write all plots of a training log; returns their paths."""
    drawn = {
        "scales_by_layer.png": _by_layer(series, title),
        "scales_distribution.png": _distribution(series, title),
        "scales_over_steps.png": _over_steps(series, title),
        "flushed_saturated.png": _shares(series, title),
    }
    return _save(drawn, folder)


def plot_inference(series: Sequence[Series], folder: Path, *, title: str) -> list[Path]:
    """Write the plot of an inference log: scales of the last forward over layers, one line per linear."""
    operands = _operands(series)
    figure, axes = _grid(1, len(operands), title=f"{title}: scales at inference", size=(4.6, 3.6))
    for operand, panel in zip(operands, axes[0], strict=True):
        for one in _of(series, operand=operand):
            style = {"color": _LINEARS.get(one.linear, _OTHER), "label": one.linear}
            panel.plot(one.layers, one.fields["log2_scale"][-1], marker="o", markersize=4, **style)
        panel.set_title(OPERANDS.get(operand, operand))
        panel.set_xlabel("layer")
        _whole_numbers(panel, x=True, y=True)
    axes[0][0].set_ylabel("log2 scale")
    _widen(axes[0])
    _legend(figure, axes[0][0])
    return _save({"scales_inference.png": figure}, folder)


def _by_layer(series: Sequence[Series], title: str) -> Figure:
    """Scale over layers at start, middle and end of training, in the band of all sampled steps."""
    when = moments(series)

    def draw(panel: Axes, one: Series) -> None:
        scale = one.fields["log2_scale"]
        low, high = _extent(scale, axis=0)
        panel.fill_between(one.layers, low, high, color="#000000", alpha=0.12, linewidth=0, label="all steps")
        for name, step in when.items():
            if step in one.steps:
                color, marker = _MOMENTS[name]
                values = scale[one.steps.index(step)]
                label = f"{name}, step {step}"
                panel.plot(one.layers, values, color=color, marker=marker, markersize=4, label=label)
        _whole_numbers(panel, x=True, y=True)

    figure, axes = _panels(series, draw, title=f"{title}: scales by layer", x="layer")
    _legend(figure, axes[0][0])
    return figure


def _over_steps(series: Sequence[Series], title: str) -> Figure:
    """Scale over training, a line per layer."""
    layers = sorted({layer for one in series for layer in one.layers})
    colormap = matplotlib.colormaps["viridis"]
    place = Normalize(layers[0], max(layers[-1], layers[0] + 1))

    def draw(panel: Axes, one: Series) -> None:
        for j, layer in enumerate(one.layers):
            values, color = one.fields["log2_scale"][:, j], colormap(place(layer))
            panel.plot(one.steps, values, color=color, linewidth=1.1, marker=".", markersize=3)
        _whole_numbers(panel, x=True, y=True)

    figure, axes = _panels(series, draw, title=f"{title}: scales over training, by layer", x="step")
    bar = figure.colorbar(
        ScalarMappable(place, colormap), ax=axes.ravel().tolist(), label="layer", aspect=40, pad=0.015
    )
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    return figure


def _distribution(series: Sequence[Series], title: str) -> Figure:
    """Distribution over layers, per linear type, at start, middle and end."""
    when, operands = moments(series), _operands(series)
    heading = f"{title}: distribution of scales over layers"
    figure, axes = _grid(1, len(operands), title=heading, size=(3.8, 3.8), share_y=False)
    for operand, panel in zip(operands, axes[0], strict=True):
        members = _of(series, operand=operand)
        for k, (name, step) in enumerate(when.items()):
            color, marker = _MOMENTS[name]
            for place, one in enumerate(members):
                values = one.at(step, "log2_scale") if step in one.steps else np.empty(0)
                if not values.size:
                    continue
                at = place + 0.27 * (k - (len(when) - 1) / 2)
                box = {"boxprops": {"color": color}, "medianprops": {"color": color, "linewidth": 2}}
                lines = {"whiskerprops": {"color": color}, "capprops": {"color": color}, "showfliers": False}
                panel.boxplot(values, positions=[at], widths=0.2, manage_ticks=False, **box, **lines)
                spread = np.linspace(-0.06, 0.06, values.size) if values.size > 1 else np.zeros(1)
                label = f"{name}, step {step}" if place == 0 else None
                style = {"color": color, "marker": marker, "s": 12, "alpha": 0.6, "linewidths": 0}
                panel.scatter(at + spread, values, label=label, **style)
        panel.set_xticks(range(len(members)), [one.linear for one in members])
        panel.set_title(OPERANDS.get(operand, operand))
        _whole_numbers(panel, x=False, y=True)
    axes[0][0].set_ylabel("log2 scale")
    _widen(axes[0])
    _legend(figure, axes[0][0])
    return figure


def _shares(series: Sequence[Series], title: str) -> Figure:
    """Flushed and saturated shares over training by linear type: mean and worst over layers."""
    operands = _operands(series)
    heading = f"{title}: values flushed to zero and saturated (mean over layers; dotted: the worst layer)"
    figure, axes = _grid(2, len(operands), title=heading, size=(3.8, 2.7), share_y=True)
    for row, field in zip(axes, ("flushed", "saturated"), strict=True):
        largest = 0.0
        for operand, panel in zip(operands, row, strict=True):
            for one in _of(series, operand=operand):
                percent, color = 100 * one.fields[field], _LINEARS.get(one.linear, _OTHER)
                mean, (_, worst) = _mean(percent), _extent(percent, axis=1)
                panel.plot(one.steps, mean, color=color, marker=".", markersize=4, label=one.linear)
                panel.plot(one.steps, worst, color=color, linestyle=":", linewidth=1)
                largest = max(largest, float(np.nanmax(worst, initial=0.0)))
            panel.set_title(OPERANDS.get(operand, operand) if field == "flushed" else "")
            panel.set_xlabel("step" if field == "saturated" else "")
            _whole_numbers(panel, x=True, y=False)
        row[0].set_ylabel(f"{field}, %")
        if largest == 0:  # an axis around zero would show rounding as structure
            row[0].set_ylim(-0.05, 1)
            row[0].text(
                0.5, 0.5, "none, in any operand", transform=row[0].transAxes, ha="center", color=_OTHER
            )
        else:
            row[0].set_ylim(-0.03 * largest, 1.08 * largest)
    _legend(figure, axes[0][0])
    return figure


def _panels(
    series: Sequence[Series], draw: Callable[[Axes, Series], None], *, title: str, x: str
) -> tuple[Figure, np.ndarray]:
    """``draw`` called on a panel per (operand, linear)."""
    operands, linears = _operands(series), list(dict.fromkeys(one.linear for one in series))
    figure, axes = _grid(len(operands), len(linears), title=title, size=(2.9, 2.2))
    for i, operand in enumerate(operands):
        for j, linear in enumerate(linears):
            found = [one for one in _of(series, operand=operand) if one.linear == linear]
            for one in found:
                draw(axes[i][j], one)
            axes[i][j].set_visible(bool(found))
        axes[i][0].set_ylabel(f"{OPERANDS.get(operand, operand)}\nlog2 scale")
    _widen(axes[:, 0])
    for panel, linear in zip(axes[0], linears, strict=True):
        panel.set_title(linear)
    for panel in axes[-1]:
        panel.set_xlabel(x)
    return figure, axes


def _grid(
    rows: int, columns: int, *, title: str, size: tuple[float, float], share_y: bool = True
) -> tuple[Figure, np.ndarray]:
    wide, high = max(size[0] * columns, 6.5), size[1] * rows + 0.9
    figure = Figure(figsize=(wide, high), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1, sharey="row" if share_y else False)
    for panel in axes.ravel():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure, axes


def _whole_numbers(panel: Axes, *, x: bool, y: bool) -> None:
    for axis, wanted in ((panel.xaxis, x), (panel.yaxis, y)):
        if wanted:
            axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _widen(panels: Iterable[Axes]) -> None:
    """Give scales that hardly differ an axis of two powers of two; call it when all is drawn."""
    for panel in panels:
        low, high = panel.get_ylim()
        if high - low < 2:
            panel.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _extent(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest number along ``axis``; NaN where there is none."""
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(axis)
    high = np.where(finite, values, -np.inf).max(axis)
    some = finite.any(axis)
    return np.where(some, low, np.nan), np.where(some, high, np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over layers of [steps, layers]; NaN where there is none."""
    count = np.isfinite(values).sum(1)
    return np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)


def _operands(series: Sequence[Series]) -> list[str]:
    return list(dict.fromkeys(one.operand for one in series))


def _of(series: Sequence[Series], *, operand: str) -> list[Series]:
    return [one for one in series if one.operand == operand]


def _save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return [folder / name for name in figures]
