"""Levels, reductions and ablations on real text, paired: one table from many runs, resumable.

    fp8train data prepare NOVELS --output data/novels/novels --vocab-size 4096
    python tools/experiments.py --out runs/experiments            # trains what is missing, then the table
    python tools/experiments.py --out runs/experiments --table    # only the table of what is there

Every run trains ``configs/experiments/novels.yaml`` (or ``--config``) on ``--ranks`` processes with the
overrides of its name below: those of ``PAIRED`` with every seed, the rest with the first ``--rest`` of them.
Runs of one seed share initial weights and batches, so their losses are compared in pairs: the mean of the
differences to O0 (or to the same layout without one FP8 collective) with a 95 % interval (Student's t), and
how many pairs of this scatter it would take to bring that to ±0.01. Means stand beside those of the other run
on the same seeds. One pair shows nothing smaller than the scatter of pairs.

A run that is complete is not run again; one that was interrupted continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
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
    "O2 tp 2": ["precision.level=O2", "parallel.tp=2"],
    "O2 tp 2, grad_input": ["precision.level=O2", "parallel.tp=2", "precision.traffic.grad_input=fp8"],
    "O2 tp 2, output": ["precision.level=O2", "parallel.tp=2", "precision.traffic.output=fp8"],
    "O2 pp 2": ["precision.level=O2", "parallel.pp=2"],
    "O2 pp 2, pipeline": ["precision.level=O2", "parallel.pp=2", "precision.traffic.pipeline=fp8"],
}
STATIC_RATES = {"mus": "0.125", "umup": "1.0", "unit_scaling": "0.125"}
"""Learning rates of recipes whose weights have unit variance, from tools/sweep_lr.py."""
MEASURED = (
    *("fp8_amax", "te_delayed", "te_current", "te_delayed_recent", "mse", "cscale"),
    *("rowwise", "rowwise_gw_hp", "blockwise", "mxfp8", "coat_act", "nvfp4_simulated"),
)
"""Recipes of the standard parametrisation: their BF16 run is O0."""
RUNS |= {name: ["precision.level=O1", f"precision.recipe={name}"] for name in MEASURED}
RUNS["cscale"] += [f"precision.gemm.{use}.x.constant_exponent=0" for use in ("output", "grad_weight")]
for _name, _rate in STATIC_RATES.items():
    _own = [f"precision.recipe={_name}", "model.tie_embeddings=false", f"optimizer.lr={_rate}"]
    RUNS |= {f"{_name} BF16": _own, _name: [*_own, "precision.level=O1"]}
"""Name -> overrides. ``#0`` to ``#4`` are the rows of FP8-LM's Table 6; its #1 is O0."""
PAIRED = (
    *("O0", "O1", "O2", "O2 exact", "O1 paper", "rowwise", "rowwise_gw_hp", "fp8_amax", "te_delayed"),
    *("mus", "mus BF16", "umup", "umup BF16"),
)
"""Run with every seed; the others with the first few."""
BASES = {
    **dict.fromkeys(("O2 tp 2, grad_input", "O2 tp 2, output"), "O2 tp 2"),
    "O2 pp 2, pipeline": "O2 pp 2",
    **{name: f"{name} BF16" for name in STATIC_RATES},
}
"""What a run is compared with, if not with O0: the same layout without that collective in FP8, the same
parametrisation in BF16."""
DIVERGED = 3
"""Exit status of a run whose gradients stayed non-finite, which is a result and no failure."""

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Outcome:
    """A finished run: last validation loss in nats per token, steps whose gradients were not finite, and
    spikes of the training loss (None where it was not counted)."""

    loss: float
    skipped: int
    spikes: int | None = None


def spikes(losses: list[float]) -> int:
    """Logged losses, after the first tenth, that exceed the median of the ten before them by more than five
    times those ten's own spread (1.4826 times the median absolute deviation); neighbours count once."""
    count, inside = 0, False
    for i in range(max(10, len(losses) // 10), len(losses)):
        window = losses[i - 10 : i]
        middle = statistics.median(window)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in window)
        high = losses[i] - middle > max(5 * spread, 0.1)
        count += high and not inside
        inside = high
    return count


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
    return Outcome(
        losses[-1], skipped[-1], spikes([float(row["train/loss"]) for row in rows if "train/loss" in row])
    )


def diverged(folder: Path) -> bool:
    """Whether a run ended because its gradients stayed non-finite."""
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["exit_code"] == DIVERGED


def train(args: argparse.Namespace, name: str, seed: int) -> None:
    """Run one to its end unless it is there already. A run that diverges is reported, not fatal."""
    folder = directory(args.out, name, seed)
    if outcome(folder) is not None or diverged(folder):
        print(f"{name}, seed {seed}: complete", flush=True)
        return
    command = [sys.executable, "-m"]
    if args.ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}", "-m"]
    command += ["fp8train", "train", str(args.config.resolve()), f"run.dir={args.out.resolve()}"]
    command += [f"run.name={folder.name}", f"run.seed={seed}", "checkpoint.resume=auto"]
    command += ["checkpoint.interval=100", "checkpoint.keep_last=1", *args.overrides, *RUNS[name]]
    start = time.monotonic()
    print(f"{name}, seed {seed}: training", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (args.out / f"{folder.name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0 and not diverged(folder):
        raise SystemExit(f"{name}, seed {seed} failed with status {done.returncode}; see {log.name}")
    found = outcome(folder)
    loss = "diverged" if found is None else f"{found.loss:.4f}"
    print(f"{name}, seed {seed}: {loss} ({time.monotonic() - start:.0f} s)", flush=True)


Outcomes = dict[tuple[str, int], Outcome]


def read_outcomes(out: Path, file: Path | None) -> Outcomes:
    """Finished runs under ``out``, and those that ``file`` remembers from elsewhere."""
    found: Outcomes = {}
    if file is not None and file.exists():
        for run in json.loads(file.read_text())["runs"]:
            found[run["name"], run["seed"]] = Outcome(run["loss"], run["skipped"], run.get("spikes"))
    for name in RUNS:
        for folder in out.glob(f"{directory(out, name, 0).name.removesuffix('0')}*/"):
            here = outcome(folder)
            if here is not None:
                found[name, int(folder.name.rpartition("seed")[2])] = here
    return found


def write_outcomes(found: Outcomes, file: Path) -> None:
    """Remember them."""
    runs = [{"name": name, "seed": seed, **vars(one)} for (name, seed), one in sorted(found.items())]
    file.write_text(json.dumps({"script": "tools/experiments.py", "runs": runs}, indent=1) + "\n")


def quantile(pairs: int) -> float:
    """Student's t for a two-sided 95 % interval of so many pairs: from the normal quantile by the first two
    terms of its expansion in 1 / (pairs - 1); within 1 % from 5 pairs on. Fewer come from a table."""
    if pairs - 1 in _T95:
        return _T95[pairs - 1]
    z, freedom = 1.959964, pairs - 1
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def pairs_for(spread: float, half_width: float) -> int:
    """How many pairs would bring a 95 % interval to ± ``half_width``, if they scatter by ``spread``."""
    pairs = 2
    while quantile(pairs) * spread / math.sqrt(pairs) > half_width:
        pairs += 1
    return pairs


def row(out: Path, found: Outcomes, name: str, seeds: list[int]) -> str:
    """One line of the table. Means are over the seeds that both runs of the comparison have."""
    done = {s: o for s in seeds if (o := found.get((name, s))) is not None}
    if not done:
        gone = sum(diverged(directory(out, name, s)) for s in seeds)
        return f"| {name} | {f'diverged ({gone})' if gone else 'not run'} | | | | | | | |"
    other = BASES.get(name, "O0")
    compared = name != other and not name.endswith(" BF16")
    common = [s for s in done if not compared or (other, s) in found]
    losses = [done[s].loss for s in common] or [one.loss for one in done.values()]
    cells = [name, f"{statistics.fmean(losses):.4f}"]
    if compared and common:
        base = [found[other, s].loss for s in common]
        gaps = [loss - own for loss, own in zip(losses, base, strict=True)]
        cells += [f"{other}: {statistics.fmean(base):.4f}", f"{statistics.fmean(gaps):+.4f}"]
        if len(gaps) > 1:
            spread = statistics.stdev(gaps)
            half = quantile(len(gaps)) * spread / math.sqrt(len(gaps))
            mean = statistics.fmean(gaps)
            cells += [f"{mean - half:+.4f} to {mean + half:+.4f}", str(pairs_for(spread, 0.01))]
        else:
            cells += ["", ""]
    else:
        cells += [""] * 4
    counted = [o.spikes for o in done.values() if o.spikes is not None]
    among = "" if len(counted) == len(done) else f" in {len(counted)}"
    cells += [str(len(losses)), str(sum(o.skipped for o in done.values()))]
    cells += [f"{sum(counted)}{among}" if counted else ""]
    return f"| {' | '.join(cells)} |"


def table(out: Path, found: Outcomes, names: list[str], seeds: list[int]) -> str:
    """Markdown: loss, the other run's loss on the same seeds, paired gap with its interval, seeds."""
    base = [o.loss for s in seeds if (o := found.get(("O0", s))) is not None]
    spread = statistics.stdev(base) if len(base) > 1 else math.nan
    lines = [
        f"O0's standard deviation over {len(base)} seeds: {spread:.4f} nats.",
        "",
        "| run | mean loss | compared with, same seeds | gap, paired | 95 % interval | pairs for ±0.01 "
        "| seeds | skipped steps | spikes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(out, found, name, seeds) for name in names])


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/experiments/novels.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rest", type=int, default=1, help=f"seeds of runs other than {', '.join(PAIRED)}")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--json", type=Path, help="remember outcomes here; what it has is not run again")
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value, for all runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for number, seed in enumerate(args.seeds):
            for name in args.runs:
                known = (name, seed) in read_outcomes(args.out, args.json)
                if not known and (name in PAIRED or number < args.rest):
                    train(args, name, seed)
    found = read_outcomes(args.out, args.json)
    if args.json is not None:
        write_outcomes(found, args.json)
    print(table(args.out, found, args.runs, args.seeds))


if __name__ == "__main__":
    main()
