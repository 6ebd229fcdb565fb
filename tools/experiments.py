"""Levels, reductions and ablations on real text, paired: one table from many runs, resumable.

    python tools/experiments.py --data data/novels/novels --out runs/experiments [--runs O0 O1 O2] [--seeds
    1 2 3] python tools/experiments.py --out runs/experiments --table          # only the table of what is
    there

Every run trains the quick start's Llama (or ``--config``) with the overrides of its name below. Runs of one
seed share initial weights and batches, so their losses are compared in pairs: the mean of the differences
to O0 with a 95 % interval (Student's t), beside the standard deviation of O0 over seeds. A run that is
complete is not run again; one that was interrupted continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS: dict[str, list[str]] = {
    "O0": ["precision.level=O0"],
    "FP8 GEMMs": ["precision.gemm.fp8=true"],
    "O1": ["precision.level=O1"],
    "O2": ["precision.level=O2"],
    "O2 exact": ["precision.level=O2", "precision.gradient.fp8.reduce=exact"],
    "O2 v 8-bit expanded": ["precision.level=O2", "precision.state.exp_avg_sq={format: e4m3, expand: true}"],
    "O1 paper": ["precision.level=O1", "precision.profile=paper"],
    "#0 FP32": ["precision.compute=fp32"],
    "#2a paper": ["precision.level=O2", "precision.profile=paper"],
    "#2b BF16 master": [
        "precision.level=O2",
        "precision.profile=paper",
        "precision.state.master.format=bf16",
    ],
    "#3 FP8 master": ["precision.level=O2", "precision.profile=paper", "precision.state.master.format=e4m3"],
    "#4 FP8 v": ["precision.level=O2", "precision.profile=paper", "precision.state.exp_avg_sq.format=e4m3"],
    "FP8 accumulation": [
        *("precision.level=O2", "precision.profile=paper", "precision.gradient.fp8.accumulate=fp8"),
    ],
}
"""Name -> overrides. ``#0`` to ``#4`` are the rows of FP8-LM's Table 6; its #1 is O0."""

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Outcome:
    """A finished run: last validation loss in nats per token, and whether gradients stayed finite."""

    loss: float
    skipped: int


def directory(out: Path, name: str, seed: int) -> Path:
    """Where a run lives."""
    safe = "".join(c if c.isalnum() else "_" for c in name).strip("_")
    return out / f"{safe}_seed{seed}"


def outcome(folder: Path) -> Outcome | None:
    """What a run left behind; None if it is not complete."""
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text())["state"] != "completed":
        return None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [float(row["eval/loss"]) for row in rows if "eval/loss" in row]
    skipped = [int(row["optim/skipped_steps"]) for row in rows if "optim/skipped_steps" in row]
    return Outcome(losses[-1], skipped[-1])


def train(args: argparse.Namespace, name: str, seed: int) -> None:
    """Run one to its end unless it is there already. A run that diverges is reported, not fatal."""
    folder = directory(args.out, name, seed)
    if outcome(folder) is not None:
        print(f"{name}, seed {seed}: complete", flush=True)
        return
    command = [sys.executable, "-m", "fp8train", "train", str(args.config), f"data.prefix={args.data}"]
    command += [
        f"run.dir={args.out}",
        f"run.name={folder.name}",
        f"run.seed={seed}",
        "checkpoint.resume=auto",
    ]
    command += ["checkpoint.interval=100", "checkpoint.keep_last=1", *args.overrides, *RUNS[name]]
    print(f"{name}, seed {seed}: training", flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 3: gradients stayed non-finite, which is a result
        raise SystemExit(f"{name}, seed {seed} failed with status {done.returncode}:\n{done.stderr}")
    found = outcome(folder)
    print(f"{name}, seed {seed}: {'diverged' if found is None else f'{found.loss:.4f}'}", flush=True)


def table(out: Path, names: list[str], seeds: list[int]) -> str:
    """Markdown: loss, paired gap to O0 with its interval, seeds."""
    found = {(n, s): outcome(directory(out, n, s)) for n in names for s in seeds}
    base = [o.loss for s in seeds if (o := found.get(("O0", s))) is not None]
    spread = statistics.stdev(base) if len(base) > 1 else math.nan
    lines = [
        f"O0's standard deviation over {len(base)} seeds: {spread:.4f} nats.",
        "",
        "| run | mean loss | gap to O0, paired | 95 % interval | seeds | skipped steps |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        done = {s: o for s in seeds if (o := found[name, s]) is not None}
        if not done:
            lines.append(f"| {name} | not run or diverged | | | 0 | |")
            continue
        gaps = [o.loss - b.loss for s, o in done.items() if (b := found.get(("O0", s))) is not None]
        interval = ""
        if len(gaps) > 1 and name != "O0":
            half = _T95[min(len(gaps) - 1, 9)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
            interval = f"{statistics.fmean(gaps) - half:+.4f} to {statistics.fmean(gaps) + half:+.4f}"
        gap = f"{statistics.fmean(gaps):+.4f}" if gaps and name != "O0" else ""
        mean = statistics.fmean(o.loss for o in done.values())
        skipped = sum(o.skipped for o in done.values())
        lines.append(f"| {name} | {mean:.4f} | {gap} | {interval} | {len(done)} | {skipped} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart/llama.yaml"))
    parser.add_argument("--data", default="data/quickstart/stdlib", help="dataset prefix")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value, for all runs")
    args = parser.parse_args()
    if not args.table:
        for seed in args.seeds:
            for name in args.runs:
                train(args, name, seed)
    print(table(args.out, args.runs, args.seeds))


if __name__ == "__main__":
    main()
