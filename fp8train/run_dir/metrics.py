"""Metric records: what one line of ``metrics.jsonl`` holds.

A record is flat: ``step``, ``tokens`` (the two x-axes) and named numbers. Names say their section
(``train/loss``). JSON has no NaN: Python would write a bare ``NaN`` that other readers refuse, so non-finite
numbers are the strings ``nan``, ``inf``, ``-inf`` and are never left out: a NaN is news.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8train.json_text import records

SECTIONS = frozenset(
    {"train", "optim", "throughput", "memory", "time", "data", "fp8", "comm", "checkpoint", "eval"}
)


def metrics_record(step: int, tokens: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Make a record of strict JSON for :meth:`fp8train.run_dir.directory.RunDir.log_metrics`.

    Args:
        step: optimizer steps done.
        tokens: training tokens seen in them.
        metrics: numbers by name ``section/name``; ints stay ints.
    """
    for name in metrics:
        section, slash, rest = name.partition("/")
        assert slash and rest and section in SECTIONS, f"metric {name!r} is not named section/name"
    return {"step": step, "tokens": tokens, **{name: strict(value) for name, value in metrics.items()}}


def strict(value: float) -> float | str:
    """The number, or its name where JSON has none."""
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All records of a ``metrics.jsonl``, non-finite numbers as floats again. Lines that cannot be read are
    left out: the last one, if a kill tore it, and damaged ones.
    """
    found = []
    for _, record in records(path):
        try:
            found.append({name: float(v) if isinstance(v, str) else v for name, v in (record or {}).items()})
        except ValueError:
            continue
    return [record for record in found if record]
