"""Reading the cast log of a run: what each FP8 cast did, by step, layer, linear and operand.

``casts.jsonl`` is written by training on sampled steps (:mod:`fp8train.numerics.statistics` says what the
numbers are), ``inference_casts.jsonl`` by ``tools/cscale_window.py`` for a forward without training. Each
line is one cast site, ``layers.3.attention.qkv/x``, at one step.

Files may hold a step twice: a job that was killed and continued repeats the steps since its checkpoint, and
although a resumed job cuts the log first, copies and concatenations of logs do not. Whenever steps go back,
what was read of them before is dropped, so the later wins, also where the later part sampled other steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8train.config.length import sampling_interval
from fp8train.config.loader import load_file
from fp8train.config.nodes import Node
from fp8train.json_text import records
from fp8train.reporting.errors import ReportError
from fp8train.run_dir.claim import STATUS_FILE, load_status

TRAINING_LOG = "casts.jsonl"
INFERENCE_LOG = "inference_casts.jsonl"
_SITE = re.compile(r"layers\.(\d{1,9})\.(?:.+\.)?([^./]+)/([^/]+)")
_BEYOND = 1e300
"""Finite numbers above it are nobody's statistics, and their differences overflow."""


@dataclass(frozen=True)
class CastSample:
    """What one cast did at one step.

    Attributes:
        step: optimizer steps done, this one included.
        layer: index of the decoder block.
        linear: ``qkv``, ``out``, ``up`` or ``down``.
        operand: ``x``, ``w``, ``grad_output`` or ``grad_weight``.
        values: the fields of :data:`fp8train.numerics.statistics.FIELDS`; NaN and infinity as floats.
    """

    step: int
    layer: int
    linear: str
    operand: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class CastLog:
    """What a run directory tells about its casts.

    Attributes:
        run: the directory.
        state: of ``status.json``: running, completed, stopped, failed or interrupted.
        step: the last step that ``status.json`` knows; that of its start for a running job.
        training: samples in training order; empty where there is no such log.
        inference: those of a forward without training.
        notes: what was left out, for the reader of the report.
    """

    run: Path
    state: str
    step: int
    training: tuple[CastSample, ...]
    inference: tuple[CastSample, ...]
    notes: tuple[str, ...]


def read_cast_log(run: Path) -> CastLog:
    """Read the cast logs of a run directory; the run may still be going on.

    Raises:
        ReportError: it is not a run directory, or the run has no cast statistics; the message says why.
    """
    status = _status(run)
    notes: list[str] = []
    training = read_samples(run / TRAINING_LOG, notes)
    inference = read_samples(run / INFERENCE_LOG, notes)
    if not training and not inference:
        raise ReportError(_why_nothing(run, status))
    if training and len({sample.step for sample in training}) == 1 and (advice := _sample_more(run, status)):
        notes.append(f"{TRAINING_LOG}: one step was sampled; {advice}")
    return CastLog(run, status["state"], status["step"], training, inference, tuple(notes))


def read_samples(path: Path, notes: list[str]) -> tuple[CastSample, ...]:
    """The samples of one log; none where there is no file. What is left out is added to ``notes``."""
    if not path.is_file():
        return ()
    kept: dict[int, dict[str, CastSample]] = {}
    elsewhere: set[str] = set()
    torn, last = 0, 0
    for _, record in records(path):
        line = None if record is None else _fields(record)
        if line is None:
            torn += 1
            continue
        step, site, values = line
        if step < last:  # the job went back to a checkpoint
            kept = {at: samples for at, samples in kept.items() if at < step}
        last = step
        found = _SITE.fullmatch(site)
        if found is None:
            elsewhere.add(site)
        else:
            sample = CastSample(step, int(found[1]), found[2], found[3], values)
            kept.setdefault(step, {})[site] = sample
    if torn:
        notes.append(f"{path.name}: {torn} unreadable line{'s' if torn > 1 else ''} left out")
    if elsewhere:
        notes.append(f"{path.name}: left out, in no layer: {', '.join(sorted(elsewhere)[:3])}")
    return tuple(sample for samples in kept.values() for sample in samples.values())


def _fields(record: Mapping[str, Any]) -> tuple[int, str, dict[str, float]] | None:
    """Step, site and numbers of a line of the log; None for a line of something else."""
    step, site = record.get("step"), record.get("site")
    if not isinstance(step, int) or not isinstance(site, str) or not 0 <= step < 2**63:
        return None
    try:
        # + 0.0: the log2 of a scale of one is -0.0 in the log
        values = {name: float(v) + 0.0 for name, v in record.items() if name not in ("step", "site")}
    except (ValueError, TypeError, OverflowError):
        return None
    if any(_BEYOND < abs(number) < math.inf for number in values.values()):
        return None
    return step, site, values


def _status(run: Path) -> Mapping[str, Any]:
    if not run.is_dir():
        raise ReportError(f"{run}: {'not a directory' if run.exists() else 'no such directory'}")
    try:
        return load_status(run)
    except FileNotFoundError:
        raise ReportError(
            f"{run} is not a run directory (no {STATUS_FILE}); give the folder that holds {STATUS_FILE} and "
            f"{TRAINING_LOG}"
        ) from None
    except OSError as error:
        raise ReportError(f"{run / STATUS_FILE}: {error.strerror or error}") from None
    except ValueError as error:
        raise ReportError(f"{run / STATUS_FILE} is damaged: {error}") from None


def _why_nothing(run: Path, status: Mapping[str, Any]) -> str:
    config_file = run / "config.yaml"
    root = load_file(config_file)[0] if config_file.is_file() else None
    if root is not None and _setting(root, "precision", "gemm", "fp8") is False:
        return (
            f"{run} trained without FP8 (precision.gemm.fp8: false), so it has no casts to show\n"
            f"for the scales that FP8 inference with its model would use, run  "
            f"tools/cscale_window.py {run}  and then this report"
        )
    if root is not None and _setting(root, "logging", "cast_statistics_interval") == 0:
        return (
            f"{run} kept no cast statistics (logging.cast_statistics_interval: 0); "
            "train with logging.cast_statistics_interval=50, say"
        )
    where = f"{run} holds no cast statistics yet ({status['state']} at step {status['step']})"
    return f"{where}; {_sample_more(run, status) or 'the first are written after the first step'}"


def _sample_more(run: Path, status: Mapping[str, Any]) -> str:
    """What to lower where the run is over before the next sample; empty where it is not."""
    config_file = run / "config.yaml"
    root = load_file(config_file)[0] if config_file.is_file() else None
    key = "logging.cast_statistics_interval"
    interval = None if root is None else _setting(root, *key.split("."))
    steps = status["step"]
    if status["state"] == "running" or not isinstance(interval, int) or not 0 < steps < interval:
        return ""
    return (
        f"{key} is {interval}, more than the {steps} steps of the run; train with "
        f"{key}={sampling_interval(steps)}"
    )


def _setting(root: Node, *path: str) -> object:
    """A value of a configuration that another version may have written: no schema is applied."""
    node = root.find(path)
    return None if node is None else node.value
