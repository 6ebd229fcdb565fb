"""What the quick start shows of its runs: a table, a picture, a summary to quote, and the limits.

Reads what the runs left behind (``metrics.jsonl``, ``events.jsonl``, ``casts.jsonl``); trains nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from fp8train.config.resolve import ResolvedConfig
from fp8train.data.loading import open_data

# Okabe and Ito's colours: told apart by colour-blind readers, and dark to light in grey. The first line is
# wide, since the others lie on it.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": "-", "linewidth": 3.5, "marker": "o"},
    {"color": "#0072B2", "linestyle": "--", "linewidth": 1.6, "marker": "s"},
    {"color": "#D55E00", "linestyle": "-.", "linewidth": 1.6, "marker": "^"},
    {"color": "#56B4E9", "linestyle": ":", "linewidth": 2.0, "marker": "D"},
)


@dataclass(frozen=True)
class Result:
    """What one run left behind.

    Attributes:
        name: as in the table.
        directory: its run directory.
        loss: validation loss at the end, nats per token.
        bits_per_byte: the same in bits per byte of text.
        cpu_seconds: of its process, start and evaluations included.
        metrics: its metrics.jsonl.
        sent: bytes that one of two ranks sends a step for gradients, per parameter.
    """

    name: str
    directory: Path
    loss: float
    bits_per_byte: float
    cpu_seconds: float
    metrics: list[dict[str, Any]]
    sent: float = math.nan

    def event(self, kind: str) -> dict[str, Any]:
        """Its newest record of this kind in events.jsonl."""
        lines = (self.directory / "events.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind][-1]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, FP64 [points]."""
        rows = [(record["step"], float(record[name])) for record in self.metrics if name in record]
        steps, values = np.array(rows, dtype=np.float64).T
        return steps, values

    @property
    def stored(self) -> tuple[float, float]:
        """Bytes per parameter of the hidden linears: gradient and optimizer states; the weight as GEMMs read
        it."""
        shares = self.event("model")["bytes_per_parameter"]
        return shares["total"], shares["compute_copy"]

    @property
    def checkpoint(self) -> Path:
        """Its newest checkpoint."""
        return max((self.directory / "checkpoints").glob("step_????????"))

    @property
    def bytes_per_token(self) -> float:
        """Of the validation text."""
        return self.loss / math.log(2) / self.bits_per_byte


def bigram_loss(resolved: ResolvedConfig) -> float:
    """Nats per token of an interpolated bigram model, counted on the training tokens that the runs saw.

    ``p(b | a) = w·count(a, b)/count(a) + (1 - w)·(count(b) + 1)/(total + V)``; the weight w is the best of a
    grid *on the validation text*, which flatters the bigram.
    """
    config = resolved.config
    data = open_data(
        config.data,
        vocab_size=None,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        seed=config.run.seed,
        total_steps=config.total_steps,
    )
    assert data.valid is not None
    size, width = data.vocab_size, config.data.seq_length + 1
    seen = np.stack([data.train.batch(s).numpy() for s in range(config.total_steps)]).reshape(-1, width)
    num_valid = min(config.train.eval_batches, data.valid.batches_per_epoch)
    valid = np.stack([data.valid.batch(s).numpy() for s in range(num_valid)]).reshape(-1, width)
    pairs, counts = np.unique(seen[:, :-1].ravel() * size + seen[:, 1:].ravel(), return_counts=True)
    before = np.bincount(seen[:, :-1].ravel(), minlength=size)
    unigram = (np.bincount(seen[:, 1:].ravel(), minlength=size) + 1) / (seen[:, 1:].size + size)
    first, second = valid[:, :-1].ravel(), valid[:, 1:].ravel()
    keys = first * size + second
    place = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
    together = np.where(pairs[place] == keys, counts[place], 0)
    conditional = together / np.maximum(before[first], 1)
    return min(
        float(-np.log(w * conditional + (1 - w) * unigram[second]).mean())
        for w in np.linspace(0.05, 0.95, 19)
    )


def losses_table(results: Sequence[Result], bigram: float) -> Table:
    """Validation losses side by side, with bytes per parameter of the hidden linears."""
    table = Table(
        title="after the same batches: validation loss, and bytes per parameter of the hidden linears"
    )
    for heading in (
        *("run", "nats/token", "bits/byte", "gap to BF16", "in FP8"),
        *("stored", "sent a step", "CPU s"),
    ):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    bits = bigram / math.log(2) / results[0].bytes_per_token
    table.add_row("bigram", f"{bigram:.4f}", f"{bits:.3f}", *[""] * 5)
    for result in results:
        plan = result.event("model")
        table.add_row(
            result.name,
            f"{result.loss:.4f}",
            f"{result.bits_per_byte:.3f}",
            "" if result is results[0] else f"{result.loss - results[0].loss:+.4f}",
            f"{plan['fp8_linears']} of {plan['hidden_linears']}",
            "{:.2f} + {:.2f}".format(*result.stored),
            f"{result.sent:.2f}",
            f"{result.cpu_seconds:.0f}",
        )
    return table


def plot_losses(results: Sequence[Result], bigram: float, *, limit: float, path: Path) -> None:
    """Draw the training losses (means between logged steps), the validation losses and, below, both as
    differences to the first run. PNG."""
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6.4), height_ratios=(3, 2), layout="constrained"
    )
    _draw_losses(top, results, bigram)
    _draw_differences(bottom, results, limit)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_losses(axes: Axes, results: Sequence[Result], bigram: float) -> None:
    for result, style in zip(results, STYLES, strict=True):
        line = {key: value for key, value in style.items() if key != "marker"}
        axes.plot(*result.curve("train/loss_mean"), **line, label=result.name)
        _points(axes, *result.curve("eval/loss"), style)
    axes.plot([], [], "o", markerfacecolor="white", color="#666666", label="on validation text")
    axes.axhline(bigram, color="#666666", linewidth=1, linestyle=":")
    axes.text(1, bigram, "bigram model, on validation text", va="top", color="#444444", fontsize=9)
    axes.set_ylabel("loss, nats per token")
    axes.set_title("One small Llama, trained four times on the same batches", fontweight="bold")
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, results: Sequence[Result], limit: float) -> None:
    steps, reference = results[0].curve("train/loss_mean")
    _, checked = results[0].curve("eval/loss")
    axes.axhspan(-limit, limit, color="#eeeeee", linewidth=0)
    axes.axhline(0, color=STYLES[0]["color"], linewidth=1)
    for result, style in zip(results[1:], STYLES[1:], strict=True):
        line = {key: value for key, value in style.items() if key != "marker"}
        axes.plot(steps, result.curve("train/loss_mean")[1] - reference, **line)
        at, values = result.curve("eval/loss")
        _points(axes, at, values - checked, style)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1.2 * limit), max(high, 1.2 * limit))
    axes.set_title(f"The same losses minus BF16's; grey: within {limit:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("difference, nats per token")


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    axes.plot(
        x, y, linestyle="", marker=style["marker"], color=style["color"], markerfacecolor="white", zorder=4
    )


def casts_of_last_sample(result: Result) -> tuple[float, float]:
    """(flushed, saturated): the worst shares over cast sites of the last sampled step."""
    rows = [json.loads(line) for line in (result.directory / "casts.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return max(row["flushed"] for row in last), max(row["saturated"] for row in last)


def summary(results: Sequence[Result], bigram: float, *, took: str) -> list[tuple[str, str]]:
    """Six lines that say what happened, each with its name."""
    first, last = results[0], results[-1]
    plan, tokens = last.event("model"), last.metrics[-1]["tokens"]
    flushed, saturated = casts_of_last_sample(last)
    size, text = plan["parameters"] / 1e6, tokens * last.bytes_per_token / 1e6
    counts = bigram / math.log(2) / first.bytes_per_token
    lines = {
        "trained": f"a Llama of {size:.2f}M parameters, {len(results)} times from the same weights, on "
        f"{tokens:,} tokens ({text:.2f} MB) of Python",
        "quality": f"{first.name} {first.bits_per_byte:.3f} bits per byte, {last.name} "
        f"{last.bits_per_byte:.3f} (gap {last.loss - first.loss:+.4f} nats per token); bigram {counts:.3f}",
        "memory": f"{first.name} {sum(first.stored):.2f} bytes per parameter of the hidden linears, "
        f"{last.name} {sum(last.stored):.2f} (weight, gradient, states)",
        "network": f"{first.name} {first.sent:.2f} bytes per parameter sent each step for gradients, "
        f"{last.name} {last.sent:.2f} (a rank of two)",
        "in FP8": f"{plan['fp8_linears']} of {plan['hidden_linears']} hidden linears in {last.name}, "
        f"all GEMMs; last sample: {flushed:.2%} flushed, {saturated:.2%} saturated at worst",
        "time": took,
    }
    return list(lines.items())


def limits(
    results: Sequence[Result], bigram: float, *, max_gap: float, max_bits_per_byte: float
) -> list[tuple[str, bool]]:
    """What must hold at the end, in words, and whether it does."""
    gap = max(result.loss - results[0].loss for result in results[1:])  # a better one is no failure
    worst = max(result.bits_per_byte for result in results)
    plans = [result.event("model") for result in results[1:]]
    return [
        (f"bits per byte at most {max_bits_per_byte} ({worst:.3f})", worst <= max_bits_per_byte),
        (f"below the bigram model ({bigram:.4f})", max(result.loss for result in results) < bigram),
        (f"FP8 at most {max_gap} nats above BF16 ({gap:+.4f})", gap <= max_gap),
        (
            "every hidden linear ran in FP8",
            all(plan["fp8_linears"] == plan["hidden_linears"] for plan in plans),
        ),
    ]
