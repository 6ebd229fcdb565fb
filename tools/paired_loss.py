"""What a setting costs in loss: arms of one configuration, paired over seeds, in one process.

    fp8train data prepare --stdlib --glob '*.py' --output data/quickstart/stdlib --vocab-size 4096
    python tools/paired_loss.py configs/quickstart/llama.yaml --seeds 1 2 3 4 5 --json out.json \\
        --arm "O2: precision.level=O2" --arm "lean: precision.level=O2 precision.state.plan=lean" \\
        --arm "fast: precision.level=O2 accumulator=fast13" --overrides train.steps=500

An arm is ``NAME: section.key=value ...``. Arms of one seed share initial weights and batches, so the
differences of their validation losses to the first arm (``--base``: to another) are compared in pairs: mean,
95 % interval (Student's t), and how many pairs of this scatter would bring it to ±0.01.
``accumulator=fast13`` is no setting: forward GEMMs add in a model of a tensor core's registers
(:mod:`fp8train.kernels.fast_accumulation`); ``promoted13`` likewise, without fast accumulation.
``evaluate=fast13`` trains as the settings say and, at the end, validates the same weights once more in that
model: what the sums lose, without the drift of two trainings.

A run leaves no run directory, only its line in the JSON file: both losses, and the mean training loss of the
last tenth of its steps. What the file has is not run again; it is for one configuration and ``--overrides``.
:mod:`experiments` is the same for runs on several ranks, with checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments import pairs_for, quantile

from fp8train.comm.processes import Layout, processes
from fp8train.config.environment import World
from fp8train.config.resolve import load_config
from fp8train.evaluation.validation import Text, evaluate
from fp8train.kernels.gemm import emulation
from fp8train.step.trainer import Trainer
from fp8train.training.preflight import preflight
from fp8train.training.run import prepare_machine, seed_generators

ACCUMULATOR = re.compile(r"(accumulator|evaluate)=(fast|promoted)(\d+)")


class Accumulator(NamedTuple):
    """A model of an accumulator: ``fast`` or ``promoted``, and bits of its fraction."""

    kind: str
    bits: int


class Arm(NamedTuple):
    """A name, its overrides, the accumulator of its forward GEMMs (None: exact sums), and those that its
    trained weights are validated with, too."""

    name: str
    overrides: tuple[str, ...]
    accumulator: Accumulator | None = None
    evaluate: tuple[Accumulator, ...] = ()


def parse_arm(text: str) -> Arm:
    """``NAME: section.key=value ...``."""
    name, _, rest = text.partition(":")
    words = rest.split()
    found = [match for word in words if (match := ACCUMULATOR.fullmatch(word))]
    models = [(match[1], Accumulator(match[2], int(match[3]))) for match in found]
    used = [model for use, model in models if use == "accumulator"]
    return Arm(
        name.strip(),
        tuple(word for word in words if not ACCUMULATOR.fullmatch(word)),
        used[-1] if used else None,
        tuple(model for use, model in models if use == "evaluate"),
    )


def accumulate_in(trainer: Trainer, model: Accumulator) -> None:
    """Have the forward GEMMs of all linears in FP8 add like this."""
    for linear in trainer.model.linears().values():
        if linear.plan is not None:
            backend = emulation(model.bits, fast=model.kind == "fast")
            linear.plan = replace(linear.plan, backend=backend)


def train(config_file: Path, arm: Arm, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run from its first step to its validation."""
    began = time.process_time()
    resolved = load_config(config_file, [*overrides, *arm.overrides, f"run.seed={seed}"])
    config = resolved.config
    data = preflight(resolved, World(supervised=False))  # alone, and without a run directory to look at
    prepare_machine(config, 1)
    with processes("cpu", layout=Layout()) as procs:
        seed_generators(seed, 0)
        trainer = Trainer(config, procs, vocab_size=data.vocab_size)
        if arm.accumulator is not None:
            accumulate_in(trainer, arm.accumulator)
        losses, skipped = [], 0
        for step in range(config.total_steps):
            result = trainer.step(step, data.train.batch(step))
            losses.append(float(result.loss))
            skipped += not result.applied
        assert data.valid is not None, "seen by preflight"
        text = Text(data.valid, config.train.eval_batches, trainer.ignore_after, data.token_lengths)
        valid = evaluate(trainer.summed_loss, text, procs)
        again = {}
        for model in arm.evaluate:
            accumulate_in(trainer, model)
            again[f"{model.kind}{model.bits}"] = evaluate(trainer.summed_loss, text, procs).loss
    return {
        "name": arm.name,
        "overrides": list(arm.overrides),
        "accumulator": arm.accumulator,
        "seed": seed,
        "loss": valid.loss,
        "evaluated_with": again,
        "tokens": valid.tokens,
        "train_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "skipped": skipped,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


Losses = dict[tuple[str, int], float]


def row(arm: str, base: str, losses: Losses) -> str:
    """One line of the table, over the seeds that both arms have."""
    seeds = sorted(seed for name, seed in losses if name == arm and (base, seed) in losses)
    if not seeds:
        return f"| {arm} | | | | 0 | |"
    cells = [arm, f"{statistics.fmean(losses[arm, seed] for seed in seeds):.4f}"]
    gaps = [losses[arm, seed] - losses[base, seed] for seed in seeds]
    if arm == base or len(gaps) < 2:
        cells += ["", "", str(len(seeds)), ""]
    else:
        mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
        half = quantile(len(gaps)) * spread / math.sqrt(len(gaps))
        digits = "+.1e" if abs(mean) + half < 0.001 else "+.4f"
        low, middle, high = (format(value, digits) for value in (mean - half, mean, mean + half))
        cells += [middle, f"{low} to {high}", str(len(seeds)), str(pairs_for(spread, 0.01))]
    return f"| {' | '.join(cells)} |"


def table(arms: Sequence[str], base: str, runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: each arm's mean loss and its paired difference to the base; then, of the base's weights, of
    their validation in other accumulators."""
    losses: Losses = {(run["name"], run["seed"]): run["loss"] for run in runs}
    again: Losses = {
        (f"{base}, evaluated in {model}", run["seed"]): loss
        for run in runs
        if run["name"] == base
        for model, loss in run.get("evaluated_with", {}).items()
    }
    head = f"| arm | mean loss | minus {base}, paired | 95 % interval | pairs | pairs for ±0.01 |"
    names = [*arms, *dict.fromkeys(name for name, _ in again)]
    return "\n".join(
        [head, "|---|---|---|---|---|---|", *(row(name, base, losses | again) for name in names)]
    )


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--arm", type=parse_arm, action="append", required=True, metavar="NAME: OVERRIDES")
    parser.add_argument("--base", help="arm that the others are compared with; default: the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--overrides", nargs="*", default=[], help="section.key=value, for all arms")
    parser.add_argument("--json", type=Path, required=True, help="outcomes; what it has is not run again")
    args = parser.parse_args()
    arms = {arm.name: arm for arm in args.arm}
    base = args.base or args.arm[0].name
    if base not in arms:
        parser.error(f"--base {base}: no such arm; there are {', '.join(arms)}")
    same = {"config": str(args.config), "overrides": args.overrides}
    kept = json.loads(args.json.read_text()) if args.json.exists() else {**same, "runs": []}
    if {key: kept[key] for key in same} != same:
        parser.error(f"{args.json} is of {kept['config']} with {kept['overrides']}; name another file")
    done = {(run["name"], run["seed"]) for run in kept["runs"]}
    for seed in args.seeds:
        for arm in arms.values():
            if (arm.name, seed) not in done:
                run = train(args.config, arm, seed, args.overrides)
                print(f"{arm.name}, seed {seed}: {run['loss']:.4f} ({run['cpu_seconds']} CPU s)", flush=True)
                kept["runs"].append(run)
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(list(arms), base, kept["runs"]))


if __name__ == "__main__":
    main()
