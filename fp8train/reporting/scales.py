"""``fp8train report scales``: the scales of a run's FP8 casts, as the FP8 paper of Perez et al. shows them.

Perez et al. 2023 (arXiv 2309.17224) chose one power of two per tensor and plotted its exponent, the *scaling
bias*, for weights, activations and output gradients over layers, linear types and training. The same exponent
is ``log2_scale`` in our cast log: the tensor is multiplied by ``2^log2_scale`` before the cast, so a large
value means a tensor of small numbers. Where an operand has a scale per block, it is the mean over its blocks.

This module turns the log's arrays (:mod:`fp8train.reporting.scale_series`) into numbers to print and to keep:
``scales.json`` (the table) and ``scales.csv`` (every sample, one per line).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fp8train.reporting.cast_log import CastLog, read_cast_log
from fp8train.reporting.errors import ReportError
from fp8train.reporting.scale_plots import plot_inference, plot_training
from fp8train.reporting.scale_series import FIELDS, Series, moments, series_of
from fp8train.reporting.text_table import text_table

REPORT_DIR = "report"


def summarise(one: Series, when: Mapping[str, int]) -> dict[str, Any]:
    """The numbers of one series: log2 scale over layers at each moment and over everything; flushed and
    saturated shares, mean and worst with its place."""
    scale = one.fields["log2_scale"]
    at = {name: _spread(one.at(step, "log2_scale")) for name, step in when.items() if step in one.steps}
    return {
        "operand": one.operand,
        "linear": one.linear,
        "layers": len(one.layers),
        "samples": int(sum(np.isfinite(one.fields["flushed"]).ravel())),
        "not_finite": int((np.isfinite(one.fields["flushed"]) & ~np.isfinite(scale)).sum()),
        "log2_scale": {**at, "all": _spread(scale[np.isfinite(scale)])},
        "flushed": _share(one, "flushed"),
        "saturated": _share(one, "saturated"),
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not values.size:
        return None
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}


def _share(one: Series, field: str) -> dict[str, Any] | None:
    values = one.fields[field]
    if not np.isfinite(values).any():
        return None
    step, layer = np.unravel_index(np.nanargmax(values), values.shape)
    return {
        "mean": float(np.nanmean(values)),
        "worst": float(values[step, layer]),
        "worst_step": one.steps[step],
        "worst_layer": one.layers[layer],
    }


def scales_table(series: Sequence[Series]) -> str:
    """Write the summaries of all series as aligned text."""
    when = moments(series)
    heading = ["operand", "linear"]
    heading += [f"{name} ({step})" if len(when) > 1 else f"step {step}" for name, step in when.items()]
    heading += ["flushed %", "worst", "saturated %", "worst", "NaN"]
    rows = []
    for one in series:
        summary = summarise(one, when)
        scales = [_format_spread(summary["log2_scale"].get(name)) for name in when]
        shares = [
            _format_share(summary[f], part) for f in ("flushed", "saturated") for part in ("mean", "worst")
        ]
        rows.append([one.operand, one.linear, *scales, *shares])
        rows[-1].append(str(summary["not_finite"]))
    return text_table(heading, rows, left=2)


def _format_spread(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    return "/".join(f"{round(spread[name], 1):g}" for name in ("min", "median", "max"))


def _format_share(share: Mapping[str, float] | None, part: str) -> str:
    return "-" if share is None else f"{100 * share[part]:.3g}"


def write_csv(series: Sequence[tuple[str, Series]], path: Path) -> None:
    """Every sample: ``log,step,layer,linear,operand`` and the fields; a number that is not finite as
    ``nan``, ``inf``, nothing where none was logged."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["log", "step", "layer", "linear", "operand", *FIELDS])
        for log, one in series:
            for i, step in enumerate(one.steps):
                for j, layer in enumerate(one.layers):
                    values = [one.fields[name][i, j] for name in FIELDS]
                    if not np.isnan(values).all():
                        writer.writerow(
                            [log, step, layer, one.linear, one.operand, *map(repr, map(float, values))]
                        )


def report_scales(run: Path, out: Path | None = None) -> int:
    """The command: print the table, write the plots and the numbers. Returns the exit status.

    Args:
        run: a run directory, of a finished or a running job.
        out: where files go; by default ``report`` in the run directory.

    Raises:
        ReportError: nothing to show, or the files cannot be written.
    """
    log = read_cast_log(run)
    folder = run / REPORT_DIR if out is None else out
    training, inference = series_of(log.training), series_of(log.inference)
    print(describe(log, training, inference))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        labelled = [("training", one) for one in training] + [("inference", one) for one in inference]
        write_csv(labelled, folder / "scales.csv")
        (folder / "scales.json").write_text(json.dumps(_as_json(log, training, inference), indent=1) + "\n")
        written = [folder / "scales.csv", folder / "scales.json"]
        written += plot_training(training, folder, title=run.name) if training else []
        written += plot_inference(inference, folder, title=run.name) if inference else []
    except OSError as error:
        raise ReportError(
            f"cannot write to {folder} ({error.strerror}); choose a folder with --out"
        ) from None
    print("\n".join(f"wrote {path}" for path in written))
    return 0


def describe(log: CastLog, training: Sequence[Series], inference: Sequence[Series]) -> str:
    """Write the text of the report."""
    where = "" if log.state == "running" else f" at step {log.step}"  # a running job's is that of its start
    lines = [f"{log.run}: {log.state}{where}", *(f"note: {note}" for note in log.notes)]
    lines += [
        "log2 of the scale that multiplies a tensor before its cast: lowest/median/highest over layers;\n"
        "shares over all sampled steps: mean and worst; NaN: casts whose source was not finite"
    ]
    for name, series in (("training", training), ("inference", inference)):
        if series:
            steps = sorted({step for one in series for step in one.steps})
            layers = len({layer for one in series for layer in one.layers})
            span = (
                f"{len(steps)} sampled steps, {steps[0]} to {steps[-1]}"
                if len(steps) > 1
                else f"step {steps[0]}"
            )
            lines += ["", f"{name}: {layers} layers, {span}", scales_table(series)]
    return "\n".join(lines)


def _as_json(log: CastLog, training: Sequence[Series], inference: Sequence[Series]) -> dict[str, Any]:
    logs = {}
    for name, series in (("training", training), ("inference", inference)):
        if series:
            when = moments(series)
            logs[name] = {"moments": when, "series": [summarise(one, when) for one in series]}
    return {"run": log.run.name, "state": log.state, "step": log.step, "notes": list(log.notes), **logs}
