"""What the benchmarks share: timing variants in turn, and describing the machine that was timed.

Machines drift (clock, neighbours, caches), so a time alone means little. Variants are therefore timed *in
alternation* in one process, round by round, and compared by the ratio within a round; a table shows the
median and the range over rounds.

What a GPU does in one call is timed by its own events (:func:`time_calls`). The host is given a lead first,
so that the time is the device's even where launching takes longer than running.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_VARIABLES = ("OMP_", "GOMP_", "KMP_", "ONEDNN_", "ATEN_", "MKL_", "CUBLAS_", "PYTORCH_", "TRITON_")
_LEAD_CYCLES = 3_000_000
"""Cycles that a GPU is kept busy while the host queues what is timed: 1.5 ms at 2 GHz."""


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


def time_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, *, repeats: int, warmup: int = 3
) -> Timing:
    """Seconds that the device spends on one call, per repeat.

    Args:
        calls: the same work on different memory, taken in turn: with enough of them a call does not find in
            the cache what an earlier one left.
        device: CUDA, timed by events; or a CPU, by the clock.
        repeats: timed calls.
        warmup: calls before, which compile what needs it.
    """
    for number in range(warmup):
        calls[number % len(calls)]()
    if device.type != "cuda":
        seconds = []
        for number in range(repeats):
            start = time.perf_counter()
            calls[number % len(calls)]()
            seconds.append(time.perf_counter() - start)
        return Timing(tuple(seconds))
    pairs = []
    for number in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_LEAD_CYCLES)
        begin.record()
        calls[number % len(calls)]()
        end.record()
        pairs.append((begin, end))
    synchronize(device)
    return Timing(tuple(begin.elapsed_time(end) / 1e3 for begin, end in pairs))


def copy_bandwidth(device: torch.device, *, size: int = 2**30, repeats: int = 20) -> float:
    """Bytes per second of a copy of ``size`` bytes, reads and writes together."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_calls([lambda: target.copy_(source)], device, repeats=repeats).median


def cpu_model() -> str:
    """Marketing name of the processor, as the kernel reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, versions, command line and variables of the libraries; no host name."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver() if device.type == "cuda" else None,
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
    """Write a benchmark's result, keys in the given order: at once, for who reads meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)


class Results:
    """The result of a benchmark that may be cut short: written anew after each row, complete at the end.

    Attributes:
        rows: what was measured so far.
        failures: what was found wrong, in words.
    """

    def __init__(
        self, path: Path | None, device: torch.device, *, resume: bool = False, **about: Any
    ) -> None:
        """Begin the file.

        Args:
            path: where to write; None: nowhere.
            device: that is measured; described in the file.
            resume: keep the rows and failures that the file has.
            about: more to say, before the rows.
        """
        self._path = path
        self._about: dict[str, Any] = {"complete": False, "machine": describe_machine(device), **about}
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        if resume and path is not None and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            self.rows, self.failures = before["rows"], before["failures"]
        self._write()

    def add(self, **row: Any) -> None:
        """Add a row, and write."""
        self.rows.append(row)
        self._write()

    def fail(self, message: str) -> None:
        """Note, and print, what is wrong."""
        print(f"FAILED: {message}", file=sys.stderr, flush=True)
        self.failures.append(message)
        self._write()

    def finish(self, **more: Any) -> int:
        """Write for the last time, with these keys too; returns the exit status: 1 after a failure."""
        self._about |= more
        self._about["complete"] = True
        self._write()
        return 1 if self.failures else 0

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, {**self._about, "failures": self.failures, "rows": self.rows})
