"""Our own engine beside DeepSpeed: losses and step times of the quick start's model at several ranks.

    launch/setup.sh dev deepspeed && launch/quickstart.sh      # which makes the dataset
    python tools/bench/engines.py --json tools/bench/results/engines_cpu.json

Each variant is a whole run of ``fp8train train`` under torchrun, one after the other, in several *turns*.
Losses are compared step by step with those of our engine in the same format. A time is the median
of a run's steps, the first tenth left out; a ratio is DeepSpeed's to ours of the same turn, with its range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

DEEPSPEED = ("engine=deepspeed",)
CPU = ("optimizer.offload=cpu",)
FP32 = ("precision.compute=fp32",)
WHOLE_GRADIENTS = (
    "precision.level=O2",
    "precision.gradient.format=high_precision",
    "precision.state.exp_avg.format=fp32",
    "precision.state.exp_avg_sq.format=fp32",
)
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "FP32": {
        "ours": FP32,
        "ours, ZeRO-1": (*FP32, "parallel.zero=1"),
        "ZeRO-1": (*FP32, *DEEPSPEED, "parallel.zero=1"),
        "ZeRO-2": (*FP32, *DEEPSPEED, "parallel.zero=2"),
        "ZeRO-3": (*FP32, *DEEPSPEED, "parallel.zero=3", "CUT"),
        "ZeRO-2, offload": (*FP32, *DEEPSPEED, "parallel.zero=2", *CPU),
        "ZeRO-3, offload": (*FP32, *DEEPSPEED, "parallel.zero=3", *CPU, "deepspeed.offload_param=cpu", "CUT"),
    },
    "O2": {
        "ours": ("precision.level=O2",),
        "ZeRO-1": ("precision.level=O2", *DEEPSPEED, "parallel.zero=1"),
        "ZeRO-2": ("precision.level=O2", *DEEPSPEED, "parallel.zero=2"),
    },
    "FP8 GEMMs": {
        "ours": WHOLE_GRADIENTS,
        "ZeRO-3": (*WHOLE_GRADIENTS, *DEEPSPEED, "parallel.zero=3", "CUT"),
    },
}
"""By format; the first of each is what the others are compared with. ``CUT``: DeepSpeed leaves no
parameter of this small model whole."""


def run(config: str, overrides: list[str], ranks: int, folder: Path) -> list[dict[str, Any]]:
    """The logged steps of one run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "fp8train", "train", config, f"run.dir={folder}", "run.name=run", "run.overwrite=true"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(overrides)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "train/loss" in (row := json.loads(line))]


def measure(config: str, steps: int, ranks: int, turns: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Losses apart and step times, by format and variant."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as root:
        cut = Path(root, "cut.json")
        cut.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
        common = [f"train.steps={steps}", f"train.global_batch_size={2 * ranks}", "train.eval_interval=0"]
        common += ["logging.interval=1", "logging.cast_statistics_interval=0", "logging.tensorboard=false"]
        common += ["checkpoint.save_at_end=false"]
        for turn in range(turns):
            for kind, variants in VARIANTS.items():
                for name, overrides in variants.items():
                    more = [f"deepspeed.config={cut}" if one == "CUT" else one for one in overrides]
                    rows = run(config, [*common, *more], ranks, Path(root))
                    entry = found.setdefault(kind, {}).setdefault(name, {"seconds": [], "losses": []})
                    entry["seconds"].append(
                        statistics.median(row["time/step_seconds"] for row in rows[len(rows) // 10 :])
                    )
                    entry["losses"] = [row["train/loss"] for row in rows]
                    print(f"turn {turn + 1}: {kind}, {name}: {entry['seconds'][-1] * 1e3:.1f} ms", flush=True)
    for variants in found.values():
        first = next(iter(variants.values()))
        for entry in variants.values():
            pairs = list(zip(first["losses"], entry["losses"], strict=True))
            entry["apart"] = max(abs(a - b) / a for a, b in pairs)
            entry["mean_apart"] = statistics.fmean(b - a for a, b in pairs[len(pairs) // 2 :])
            entry["ratios"] = [b / a for a, b in zip(first["seconds"], entry["seconds"], strict=True)]
    for variants in found.values():
        for entry in variants.values():
            entry["last_loss"] = entry.pop("losses")[-1]
    return found


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The figures as Markdown."""
    lines = ["| format | engine | losses apart, at most | mean difference, 2nd half | step time / ours |"]
    lines += ["|---|---|---|---|---|"]
    for kind, variants in found.items():
        for name, entry in variants.items():
            low, middle, high = min(entry["ratios"]), statistics.median(entry["ratios"]), max(entry["ratios"])
            lines.append(
                f"| {kind} | {name} | {entry['apart']:.1e} | {entry['mean_apart']:+.4f} | "
                f"{middle:.2f} ({low:.2f} to {high:.2f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart/llama.yaml")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.config, args.steps, args.ranks, args.turns)
    print(table(found))
    if args.json is not None:
        about = {"torch": torch.__version__, "config": args.config, "steps": args.steps, "ranks": args.ranks}
        args.json.write_text(json.dumps({**about, "variants": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
