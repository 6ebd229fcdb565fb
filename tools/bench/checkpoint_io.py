"""Seconds and MB/s of saving and loading a checkpoint, beside ``torch.save`` and ``torch.load`` of the same
bytes.

    python tools/bench/checkpoint_io.py --json tools/bench/results/checkpoint_io_cpu.json
    python tools/bench/checkpoint_io.py --tiny

The state is that of a decoder with ``--parameters`` parameters at level O0 (FP32 master and two FP32 moments)
or O2 (FP16 master, FP8 and FP16 moments with their scales), one process. Ours writes, syncs, hashes, reads
the index back and renames; ``torch.save`` writes one file, which is synced too. Variants take turns, round by
round. The stall of an asynchronous save is what the training thread stands still; it is given relative to a
synchronous save of the same round. Files go to ``--dir``; what was just written is read from memory, by both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine, print_table, write_json
from torch import Tensor

from fp8train.checkpoint.background import BackgroundSaver
from fp8train.checkpoint.load import open_checkpoint
from fp8train.checkpoint.readback import describe
from fp8train.checkpoint.retention import Retention
from fp8train.checkpoint.save import Order, save_checkpoint, with_rank_state

_ROWS = 2048
_PARTS = {
    "O0": {"master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "O2": {"master": torch.float16, "exp_avg": torch.float8_e4m3fn, "exp_avg_sq": torch.float16},
}


def make_state(parameters: int, level: str) -> dict[str, Tensor]:
    """Random states in matrices of 2048 x 2048 elements; with one byte of scale per 128 at O2."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for i in range(max(1, parameters // _ROWS**2)):
        rows = min(_ROWS, parameters // _ROWS)
        for role, dtype in _PARTS[level].items():
            values = torch.randn(rows, _ROWS, generator=generator).to(dtype)
            tensors[f"{role}/blocks.{i}.weight"] = values
            if dtype != torch.float32:
                tensors[f"{role}/blocks.{i}.weight.scale"] = torch.full(
                    (rows, _ROWS // 128), 127, dtype=torch.uint8
                )
    return tensors


class Variants:
    """The operations that take turns; each returns seconds by name."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path) -> None:
        self.tensors, self.folder = tensors, folder
        self.targets = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        self.saver = BackgroundSaver(None)

    def torch_file(self) -> dict[str, float]:
        """torch's own."""
        path = self.folder / "state.pt"
        path.unlink(missing_ok=True)

        def save() -> None:
            with path.open("wb") as stream:
                torch.save(self.tensors, stream)
                stream.flush()
                os.fsync(stream.fileno())

        return {"torch.save + fsync": timed(save), "torch.load": timed(lambda: torch.load(path))}

    def synchronous(self) -> dict[str, float]:
        """Ours, training standing still."""
        root = self.folder / "sync"
        shutil.rmtree(root, ignore_errors=True)

        def save() -> None:
            save_checkpoint(root, 1, self.tensors, meta={}, rank_state={}, group=None, keep_last=1)

        def load(verify: Any) -> Callable[[], object]:
            path = root / "step_00000001"
            return lambda: open_checkpoint(path, group=None, verify=verify).load(self.targets)

        seconds = {"save": timed(save)}
        seconds["load, verify: full"] = timed(load("full"))
        seconds["load, verify: size"] = timed(load("size"))
        return seconds

    def asynchronous(self) -> dict[str, float]:
        """Ours, training going on."""
        root = self.folder / "async"
        shutil.rmtree(root, ignore_errors=True)
        held = with_rank_state(self.tensors, {}, 0)
        began = time.perf_counter()
        self.saver.start(Order(root, 1, {}, describe(held), Retention(1)), held)
        stall = time.perf_counter() - began
        written = self.saver.wait()
        assert written is not None
        return {"asynchronous save: stall": stall, "asynchronous save: write": written.write_seconds}


def timed(action: Callable[[], object]) -> float:
    """Seconds of ``action``."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(level: str, parameters: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All variants in turn. The first round warms up and allocates the host buffers: it is reported apart."""
    tensors = make_state(parameters, level)
    variants = Variants(tensors, folder)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for variant in (variants.torch_file, variants.synchronous, variants.asynchronous):
            for name, value in variant().items():
                seconds.setdefault(name, []).append(value)
    first_stall = seconds["asynchronous save: stall"][0]
    seconds = {name: values[1:] for name, values in seconds.items()}
    stall = [a / s for a, s in zip(seconds["asynchronous save: stall"], seconds["save"], strict=True)]
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "host_bytes_of_asynchronous_saves": variants.saver.snapshot.num_bytes,
        "seconds": seconds,
        "stall_over_synchronous": {"median": statistics.median(stall), "range": [min(stall), max(stall)]},
        "first_stall_over_synchronous": first_stall / statistics.median(seconds["save"]),
    }


def report(level: str, result: dict[str, Any]) -> None:
    """Print a level's table."""
    size = result["bytes"]
    baseline = {"save": "torch.save + fsync", "load": "torch.load"}
    rows = []
    for name, values in result["seconds"].items():
        median = statistics.median(values)
        other = baseline["load" if "load" in name else "save"]
        ratios = [b / v for v, b in zip(values, result["seconds"][other], strict=True)]
        rate = "" if "stall" in name else f"{size / median / 1e6:.0f}"
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append((name, f"{median:.3f}", rate, spread))
    print(f"{level}: {size / 1e6:.0f} MB")
    print_table(("", "seconds", "MB/s", "speed / torch"), rows)
    stall = result["stall_over_synchronous"]
    low, high = stall["range"]
    print(f"stall / synchronous save: {stall['median']:.3f} ({low:.3f} to {high:.3f})")
    print(f"the first one, which allocates: {result['first_stall_over_synchronous']:.3f}\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=1 << 26)
    parser.add_argument("--levels", nargs="+", choices=list(_PARTS), default=list(_PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dir", type=Path, help="where the files go; default: a temporary folder")
    parser.add_argument("--tiny", action="store_true", help="262144 parameters, 2 rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.parameters, args.rounds = 1 << 18, 2
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {}
    for level in args.levels:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            results[level] = measure(level, args.parameters, args.rounds, Path(folder))
        report(level, results[level])
    if args.json:
        machine = describe_machine(torch.device("cpu"))
        write_json(args.json, {"machine": machine, "parameters": args.parameters, "levels": results})


if __name__ == "__main__":
    main()
