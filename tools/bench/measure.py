"""What the benchmarks share: timing variants in turn, and describing the machine that was timed.

Machines drift (clock, neighbours, caches), so a time alone means little. Variants are therefore timed *in
alternation* in one process, round by round, and compared by the ratio within a round; a table shows the
median and the range over rounds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_VARIABLES = ("OMP_", "GOMP_", "KMP_", "ONEDNN_", "ATEN_", "MKL_")


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, per round.

    Attributes:
        seconds: mean seconds a step, one entry per round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over rounds, in seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """A quotient over rounds: median and range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def speed_ratio(variant: Timing, baseline: Timing) -> Ratio:
    """How many times faster ``variant`` is than ``baseline``, round by round."""
    ratios = [b / v for v, b in zip(variant.seconds, baseline.seconds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    steps: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    steps_per_round: int,
    warmup: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several variants alternately: every round runs ``steps_per_round`` steps of each.

    Args:
        steps: variant name -> function of the step number that runs one step.
        rounds: measurements of each variant.
        steps_per_round: steps per measurement.
        warmup: untimed steps of each variant before the first round.
        device: waited for before each clock reading.
        clock: seconds; ``time.process_time`` on a CPU that others use.
    """
    position = dict.fromkeys(steps, 0)

    def run(name: str, count: int) -> float:
        synchronize(device)
        start = clock()
        for _ in range(count):
            steps[name](position[name])
            position[name] += 1
        synchronize(device)
        return (clock() - start) / count

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in steps:
        if warmup:
            run(name, warmup)
    for _ in range(rounds):
        for name in steps:
            seconds[name].append(run(name, steps_per_round))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def cpu_model() -> str:
    """Marketing name of the processor, as the kernel reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, versions, command line and variables of the libraries; no host name."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": ["python", *sys.orig_argv[1:]],
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells))


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a benchmark's result, keys in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
