"""Learning-rate transfer: train widths x learning rates x arms of a configuration, print where each is best.

    python tools/sweep_lr.py configs/experiments/novels.yaml --out runs/transfer --widths 64 128 256 \\
        --lrs 2^-12 2^-11 2^-10 2^-9 2^-8 --steps 300 --jobs 2 --arm bf16 \\
        --arm "scaled: model.init_std={width^-0.5}" --arm "fp8: precision.gemm.fp8=true"

* A width sets ``model.hidden_size``; ``num_heads`` follows at constant ``head_dim`` (``--head-dim``, by
  default the configuration's), ``num_kv_heads`` and ``ffn_hidden_size`` keep the configuration's ratios (the
  latter rounded to a multiple of 16).
* An arm is ``NAME`` or ``NAME: section.key=value ...``: overrides laid over the configuration and
  ``--overrides``. In both, ``{width}`` stands for the width and ``{width^P}`` for its power P.
  ``--arm-lrs NAME LR ...`` gives an arm a grid of its own.
* Every run is a process with one thread, ``--jobs`` at a time. Equal seeds see the same batches.
* The loss of a run is the mean over the last tenth of its steps, or with ``--loss valid`` the validation loss
  at its end. A run whose loss is not finite, or above that of its first step, has diverged: a result, no
  failure.

``OUT/sweep.json`` is rewritten after each run; the same command continues where a killed one ended. A result
is reused only for the very same configuration. ``OUT/sweep.md`` and ``OUT/sweep.png`` are the table and the
plot; run directories stay under ``OUT/runs``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from sweep_jobs import Arm, Job, parse_arm, parse_lr, plan
from sweep_table import plot_sweep, sweep_table

from fp8train.config.errors import UserError
from fp8train.run_dir.metrics import read_metrics, strict

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = 3
"""Exit status of a run whose gradients stayed non-finite."""
LAST = 0.1
"""Share of the steps whose mean is the training loss."""
IN_USE = "in use by another job"


def measure(folder: Path) -> dict[str, Any] | None:
    """What a finished run shows; None if it did not finish.

    Returns:
        ``initial_loss``, ``loss``, ``valid_loss`` (None without evaluation) and ``diverged``: why, or "".
    """
    status_file, metrics_file = folder / "status.json", folder / "metrics.jsonl"
    status = json.loads(status_file.read_text()) if status_file.exists() else {}
    if status.get("state") != "completed" and status.get("exit_code") != DIVERGED:
        return None
    records = read_metrics(metrics_file)
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    valid = [record["eval/loss"] for record in records if "eval/loss" in record]
    last = losses[-max(1, round(LAST * len(losses))) :]
    final = math.fsum(last) / len(last)
    why = "gradients stayed non-finite" if status.get("exit_code") == DIVERGED else ""
    if not why and not (math.isfinite(final) and final <= losses[0]):
        why = "loss not finite" if not math.isfinite(final) else "loss above that of the first step"
    found = {"initial_loss": losses[0], "loss": final, "valid_loss": valid[-1] if valid else None}
    return {**{k: None if v is None else strict(v) for k, v in found.items()}, "diverged": why}


class Results:
    """``sweep.json``: one entry per finished run, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text())["runs"] if path.exists() else []
        self.runs: dict[str, dict[str, Any]] = {run["fingerprint"] + run["arm"]: run for run in known}

    def get(self, job: Job) -> dict[str, Any] | None:
        """The result of a job, from whatever earlier sweep."""
        return self.runs.get(job.fingerprint + job.arm)

    def add(self, job: Job, measured: dict[str, Any], seconds: float) -> None:
        """Keep a result, on disk too: a kill leaves the old file or the new one, whole."""
        place = {"arm": job.arm, "width": job.width, "lr": job.lr, "seed": job.seed}
        entry = place | measured | {"seconds": round(seconds, 2), "run": job.name}
        self.runs[job.fingerprint + job.arm] = entry | {"fingerprint": job.fingerprint}
        content = {"script": "tools/sweep_lr.py", "runs": list(self.runs.values())}
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(self.path)


class Runner:
    """Trains jobs in processes of their own, which :meth:`stop` ends."""

    def __init__(self, config: Path, out: Path) -> None:
        self.config, self.folder = config.resolve(), out / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, job: Job) -> tuple[dict[str, Any], float]:
        """Train one and measure it, unless it finished after its sweep was killed; its result and seconds.

        Raises:
            UserError: it failed.
        """
        began = time.monotonic()
        while (found := measure(self.folder / job.name)) is None:
            status, output = self._train(job)
            if self._stopped:
                raise UserError(f"{job}: stopped")
            if status in (0, DIVERGED):
                continue
            if IN_USE not in output:
                last = output.strip().splitlines()[-1:] or ["no output"]
                raise UserError(f"{job}: failed with status {status}: {last[0]}; see {self._log(job)}")
            time.sleep(1)  # a killed sweep left it running: its result will do
        return found, time.monotonic() - began

    def _log(self, job: Job) -> Path:
        return self.folder / f"{job.name}.log"

    def _train(self, job: Job) -> tuple[int, str]:
        """Exit status and output of one attempt."""
        command = [sys.executable, "-m", "fp8train", "train", str(self.config), *job.overrides]
        command += [f"run.dir={self.folder.resolve()}", f"run.name={job.name}"]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with self._log(job).open("ab") as file:
            before = file.tell()
            with self._lock:
                if self._stopped:
                    return -signal.SIGKILL, ""
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        return status, self._log(job).read_bytes()[before:].decode(errors="replace")

    def stop(self) -> None:
        """End everything that runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.kill()


def run_all(args: argparse.Namespace, jobs: Sequence[Job], results: Results) -> list[str]:
    """Train what is missing, telling each result as it comes; returns what failed."""
    missing = [job for job in jobs if results.get(job) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them known; {args.jobs} at a time", flush=True)
    runner, failed, began = Runner(args.config, args.out), [], time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(runner.run, job): job for job in missing}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                job = futures[future]
                error = future.exception()
                if isinstance(error, UserError):
                    failed.append(str(error))
                    print(f"[{number}/{len(missing)}] {error}", flush=True)
                    continue
                measured, seconds = future.result()
                results.add(job, measured, seconds)
                left = (time.monotonic() - began) / number * (len(missing) - number) / 60
                text = measured["diverged"] or f"{chosen(measured, args.loss):.4f}"
                print(
                    f"[{number}/{len(missing)}] {job}: {text} ({seconds:.0f} s; {left:.1f} min left)",
                    flush=True,
                )
        except BaseException:
            runner.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


def chosen(result: dict[str, Any], loss: str) -> float:
    """The loss that counts: infinite for a run that diverged."""
    return math.inf if result["diverged"] else float(result["valid_loss" if loss == "valid" else "loss"])


def collect(jobs: Sequence[Job], results: Results, loss: str) -> dict[str, dict[int, dict[float, float]]]:
    """``{arm: {width: {lr: loss}}}`` of what is known: the mean over seeds, infinite if one diverged."""
    found: dict[str, dict[int, dict[float, list[float]]]] = {}
    for job in jobs:
        if (result := results.get(job)) is not None:
            rates = found.setdefault(job.arm, {}).setdefault(job.width, {})
            rates.setdefault(job.lr, []).append(chosen(result, loss))
    return {
        arm: {
            width: {lr: math.fsum(losses) / len(losses) for lr, losses in rates.items()}
            for width, rates in widths.items()
        }
        for arm, widths in found.items()
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    parser.add_argument("--lrs", type=parse_lr, nargs="+", required=True, help="such as 2^-10 or 0.001")
    parser.add_argument("--arm", type=parse_arm, action="append", metavar="'NAME: OVERRIDES'", dest="named")
    parser.add_argument("--arm-lrs", nargs="+", action="append", default=[], metavar="NAME LR")
    parser.add_argument("--overrides", nargs="+", default=[], help="section.key=value, for all arms")
    parser.add_argument("--steps", type=int, help="default: the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="losses are averaged over them")
    parser.add_argument("--head-dim", type=int, help="default: the configuration's")
    parser.add_argument("--loss", choices=("train", "valid"), default="train")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args = parser.parse_args()
    for name in ("widths", "steps", "head_dim", "jobs"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: give 1 or more")
    args.arms = _arms(args, parser)
    return args


def _arms(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Arm]:
    named = dict(args.named or [("config", ())])
    if len(named) < len(args.named or []):
        parser.error("--arm: two arms have the same name")
    grids = {name: args.lrs for name in named}
    for name, *texts in args.arm_lrs:
        if name not in named or not texts:
            parser.error(f"--arm-lrs {name}: give the name of an arm ({', '.join(named)}) and its rates")
        try:
            grids[name] = [parse_lr(text) for text in texts]
        except argparse.ArgumentTypeError as error:
            parser.error(f"--arm-lrs {name}: {error}")
    return [Arm(name, overrides, tuple(sorted(set(grids[name])))) for name, overrides in named.items()]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        jobs = plan(args)
        args.out.mkdir(parents=True, exist_ok=True)
        results = Results(args.out / "sweep.json")
        failed = run_all(args, jobs, results)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(UserError.exit_status) from None
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from {args.out / 'sweep.json'}", file=sys.stderr)
        raise SystemExit(130) from None
    sweep = collect(jobs, results, args.loss)
    if sweep:
        table = sweep_table(sweep)
        (args.out / "sweep.md").write_text(table + "\n")
        what = (
            "validation loss"
            if args.loss == "valid"
            else f"training loss, mean of the last {LAST:.0%} of steps"
        )
        plot_sweep(sweep, args.out / "sweep.png", title=args.config.stem, loss=what)
        print(f"\n{table}\n\nwrote {args.out / 'sweep.md'}\nwrote {args.out / 'sweep.png'}")
    if failed:
        print("\n".join(["failed:", *failed]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
