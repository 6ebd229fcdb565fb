"""Many short lives of small runs, each ended by a fault, and the same command every time: is anything lost?

    python tools/soak.py                                  # 15 minutes on two cores
    python tools/soak.py --minutes 2 --seed 7 --level O3  # seed as printed: the same faults from inside

One run after the other: two ranks, at O2 and O3, saving at once and in the background in turn. Faults are
drawn for each run before it begins. Those that strike from inside, in any phase of a step and at any moment
of a save, are in its configuration (``debug.fault_injection``), hangs for the watchdog among them. Others
come from outside: signals at any
time, a STOP file, and between two lives what happens to directories: stray files, a flipped bit in the newest
checkpoint, a garbled pointer, a missing file. Then the same command starts again, until the run is complete.

A run passes if its weights are the bits of those of a run that nothing happened to, as are losses, gradient
norms and learning rates of all its steps, if every life ended by itself and said so in ``status.json``, and
if nothing is left over. The exit status is 0 if all pass.

What it stands for: at one fault in ten minutes, which is a bad cluster, a run of two hours meets a dozen
faults. Fifteen minutes of this meet some hundred, ``--minutes 120`` some thousand.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from fp8train.checkpoint.catalog import candidates  # noqa: E402
from fp8train.run_dir.metrics import read_metrics  # noqa: E402
from fp8train.training.strikes import FILLER_FILE  # noqa: E402
from fp8train.watch.last_words import HUNG  # noqa: E402
from tests.training.forked import Runs, wait_for_the_loop  # noqa: E402
from tests.training.launching import weights, write_config  # noqa: E402

STEPS, INTERVAL, EVALUATE = 40, 2, 10
INSIDE, OUTSIDE = 12, 0.35
"""Faults in the configuration of a run; how often a life has one from outside as well."""
STANDSTILL_S, STOPPED_S = 15, 5
"""The watchdog's times, when nothing happens and when a process is stopped."""
PATIENCE_S = 120.0
"""A life that takes longer than this hangs. Some seconds are normal; the machine may be busy."""
LAUNCHER_S = 40.0
"""A launcher kills the peers of a rank that failed. A checkpoint in flight may take 30 s of that."""
DISK = "48m"
COMPARED = ("step", "train/loss", "optim/grad_norm", "optim/lr", "eval/loss")

ENDS = ("exception", "exit", "sigkill", "sigterm", "sigint", "segfault", "oom_host")
HANGS = ("sigstop", "hang", "gil")
IN_STEP = ("data", "forward", "backward", "reduce", "optimizer", "report", "agree")
AT_SAVE = (
    "save",
    "save_begin",
    "save_data",
    "save_manifest",
    "save_rename",
    "save_pointer",
    "save_retention",
)
OF_RANK_0 = AT_SAVE[3:]


@dataclass
class Life:
    """One start of a run and its end."""

    run: str
    number: int
    faults: list[str] = field(default_factory=list)
    state: str = ""
    codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    began: int = 0
    """Step that it went on from."""
    reached: int = 0
    lost: int = 0
    """Steps of the life before that it had to repeat."""
    wrong: str = ""


def draw(generator: random.Random, ranks: int, *, disk: bool) -> list[dict[str, Any]]:
    """The faults from inside of one run."""
    kinds = [*ENDS * 3, *HANGS, "sleep", *(("disk_full",) * 2 if disk else ())]
    faults: list[dict[str, Any]] = []
    for _ in range(INSIDE):
        phase = generator.choice([*IN_STEP, *AT_SAVE, "build", "restore", "evaluate"])
        step = generator.randint(1, STEPS)
        if phase in AT_SAVE:
            step = -(-step // INTERVAL) * INTERVAL
        elif phase == "evaluate":
            step = -(-step // EVALUATE) * EVALUATE
        elif phase in ("build", "restore"):
            step = 0
        rank = 0 if phase in OF_RANK_0 else generator.randrange(ranks)
        fault = {"kind": generator.choice(kinds), "step": step, "phase": phase, "rank": rank}
        if fault["kind"] in ("gil", "sleep"):
            fault["seconds"] = 3600 if fault["kind"] == "gil" else 2
        if fault not in faults:
            faults.append(fault)
    return faults


def as_override(faults: list[dict[str, Any]]) -> str:
    """As on the command line."""
    texts = ["{" + ", ".join(f"{key}: {value}" for key, value in fault.items()) + "}" for fault in faults]
    return f"debug.fault_injection=[{', '.join(texts)}]"


class Soak:
    """A folder with data and the configuration of all runs."""

    def __init__(self, folder: Path, options: argparse.Namespace, *, disk: bool) -> None:
        self.folder, self.options, self.disk = folder, options, disk
        self.generator = random.Random(options.seed)
        self.runs = Runs(write_config(folder))
        self.lives: list[Life] = []
        self.passed: dict[str, bool] = {}

    def settings(self, level: str) -> list[str]:
        """What all runs of a level have in common."""
        words = [f"precision.level={level}", f"train.steps={STEPS}", f"train.eval_interval={EVALUATE}"]
        words += [f"checkpoint.interval={INTERVAL}", "checkpoint.keep_last=4", "checkpoint.resume=auto"]
        words += ["run.threads=1", "logging.cast_statistics_interval=0", "watchdog.interval_s=0.5"]
        words += [f"watchdog.{name}_timeout_s={STANDSTILL_S}" for name in ("step", "save")]
        return [*words, "watchdog.startup_timeout_s=45", f"watchdog.stopped_timeout_s={STOPPED_S}"]

    def whole(self, level: str) -> Path:
        """The run that nothing happens to."""
        path = self.folder / f"whole_{level}"
        if not path.exists():
            ranks = self.runs.start(path.name, self.settings(level), ranks=self.options.ranks)
            codes = [rank.join() or rank.exitcode for rank in ranks]
            assert codes == [0] * len(ranks), self.runs.log(path.name)
        return path

    def one_run(self, number: int) -> bool:
        """Live until the run is complete; whether it is what it would have been without faults."""
        level = (self.options.level or ("O2", "O3"))[number % len(self.options.level or "xx")]
        mode = ("sync", "async")[number // 2 % 2]
        name = f"{number:03d}_{level}_{mode}"
        faults = draw(self.generator, self.options.ranks, disk=self.disk)
        command = [*self.settings(level), f"checkpoint.asynchronous={'true' if mode == 'async' else 'false'}"]
        command.append(as_override(faults))
        path, mine = self.folder / name, []
        while True:
            if len(mine) > 3 * INSIDE:
                return self.fail(mine[-1], f"not complete after {len(mine)} lives")
            life = Life(name, len(mine) + 1)
            mine.append(life), self.lives.append(life)
            if len(mine) > 1:
                self.between(life, path)
            self.live(life, path, command, mine[-2].reached if len(mine) > 1 else 0)
            print(row(life), flush=True)
            if life.wrong:
                return False
            if life.state == "completed":
                return self.compare(life, path, level)

    def live(self, life: Life, path: Path, command: list[str], before: int) -> None:
        """One life, with a fault from outside or without."""
        struck = struck_faults(path)
        began = time.monotonic()
        ranks = self.runs.start(life.run, command, ranks=self.options.ranks)
        if self.generator.random() < OUTSIDE:
            wait_for_the_loop(ranks, path)
            self.outside(life, ranks, path)
        life.codes = self.join(ranks, began)
        life.seconds = round(time.monotonic() - began, 1)
        life.faults += sorted(struck_faults(path) - struck)
        self.look(life, path, before)

    def join(self, ranks: list[BaseProcess], began: float) -> list[int | None]:
        """Exit codes, None of a rank that did not end. As a launcher does it, a rank is killed when it
        outlives one that failed for long, or is stopped."""
        failed: float | None = None
        while any(rank.is_alive() for rank in ranks) and time.monotonic() - began < PATIENCE_S:
            time.sleep(0.01)
            if failed is None and any(rank.exitcode for rank in ranks):
                failed = time.monotonic()
            if failed is not None and time.monotonic() - failed > LAUNCHER_S:
                break
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill(), rank.join()
        return codes

    def look(self, life: Life, path: Path, before: int) -> None:
        """What this life left."""
        status = json.loads((path / "status.json").read_text()) if (path / "status.json").exists() else {}
        life.state = status.get("state", "none")
        events = path / "events.jsonl"
        lines = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
        resumed = [line["step"] for line in lines if line["kind"] == "resumed"]
        life.began = resumed[-1] if resumed else 0
        metrics = path / "metrics.jsonl"
        records = read_metrics(metrics) if metrics.exists() else []
        life.reached = max([record["step"] for record in records], default=0)
        life.lost = max(0, before - life.began)
        held = any(name.startswith("gil") for name in life.faults)  # nothing but a kill ends that
        if None in life.codes and not (held and any(life.codes)):
            life.wrong = "a rank did not end"
        elif HUNG in life.codes and not any(name.startswith(HANGS) for name in life.faults):
            life.wrong = f"a hang: {status.get('reason')}"
        elif any(life.codes) and not life.faults:
            life.wrong = "failed without a fault"
        elif life.state not in (
            "completed",
            "stopped",
            "preempted",
            "failed",
            "interrupted",
            "running",
            "none",
        ):
            life.wrong = f"status {life.state}"
        elif life.state == "completed" and any(life.codes):
            life.wrong = "completed, but a rank failed"

    def outside(self, life: Life, ranks: list[BaseProcess], path: Path) -> None:
        """A signal or a STOP file, some time after the loop began."""
        time.sleep(self.generator.uniform(0, 1.5))
        what = self.generator.choice(
            ("SIGKILL", "SIGKILL all", "SIGTERM all", "Ctrl-C", "Ctrl-C twice", "STOP")
        )
        victims = ranks if "all" in what or "Ctrl-C" in what else [self.generator.choice(ranks)]
        if not all(rank.is_alive() for rank in ranks):
            return
        life.faults.append(what)
        if what == "STOP":
            (path / "STOP").touch()
        else:
            number = signal.SIGINT if "Ctrl-C" in what else signal.Signals[what.split()[0]]
            for again in range(2 if "twice" in what else 1):
                time.sleep(1.2 * again)
                for rank in victims:
                    if rank.is_alive():
                        os.kill(rank.pid or 0, number)

    def between(self, life: Life, path: Path) -> None:
        """What happens to the directory while no job runs. A full disk is given some room first."""
        (path / "faults" / FILLER_FILE).unlink(missing_ok=True)
        found = candidates(path / "checkpoints") if (path / "checkpoints").is_dir() else []
        harm: list[Callable[[Path, random.Random], str]] = [
            stray_files,
            garbled_pointer,
            flipped_bit,
            missing_file,
            cut_file,
        ]
        if self.generator.random() < OUTSIDE and len(found) > 1:
            chosen = self.generator.choice(harm)
            target = found[0] if chosen in (flipped_bit, missing_file, cut_file) else path
            life.faults.append(chosen(target, self.generator))

    def compare(self, life: Life, path: Path, level: str) -> bool:
        """Whether the complete run is the one that nothing happened to."""
        whole = self.whole(level)
        if weights(path, STEPS) != weights(whole, STEPS):
            return self.fail(life, "other weights than without faults")
        if history(path) != history(whole):
            return self.fail(life, "other records than without faults")
        left = [one.name for one in (path / "checkpoints").glob("*.tmp")]
        return not left or self.fail(life, f"left over: {', '.join(left)}")

    def fail(self, life: Life, what: str) -> bool:
        """Mark the life that ended wrongly."""
        life.wrong = what
        print(row(life), flush=True)
        return False

    def keep(self, name: str) -> None:
        """What failed is not on a disk that goes away."""
        kept = Path(tempfile.mkdtemp(prefix="soak_failed_"))
        shutil.copytree(self.folder / name, kept / name, symlinks=True)
        for log in self.folder.glob(f"{name}.*.log"):
            shutil.copy(log, kept)
        print(f"kept in {kept}", flush=True)

    def run(self) -> None:
        """One run after the other while there is time."""
        end = time.monotonic() + 60 * self.options.minutes
        for level in self.options.level or ("O2", "O3"):
            self.whole(level)
        number = 0
        while time.monotonic() < end:
            passed = self.one_run(number)
            self.passed[self.lives[-1].run] = passed
            if not passed:
                self.keep(self.lives[-1].run)
            shutil.rmtree(self.folder / self.lives[-1].run)
            number += 1


def history(path: Path) -> list[tuple[Any, ...]]:
    """All numbers that the run recorded and that do not depend on the clock."""
    return [tuple(record.get(key) for key in COMPARED) for record in read_metrics(path / "metrics.jsonl")]


def struck_faults(path: Path) -> set[str]:
    """Those from inside that have struck, in words."""
    return {one.name.rsplit("_", 1)[0] + one.name.split(".")[-2][-6:] for one in path.glob("faults/*.json")}


def stray_files(path: Path, generator: random.Random) -> str:
    """What killed jobs, editors and people leave."""
    del generator
    (path / "checkpoints" / "step_00000099.tmp").mkdir(exist_ok=True)
    (path / "checkpoints" / "step_00000099.tmp" / "__0_0.distcp").write_bytes(b"half")
    (path / "checkpoints" / "notes.txt").write_text("mine")
    (path / ".status.json.4711.tmp").write_text("{")
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "train/lo')
    return "stray files"


def garbled_pointer(path: Path, generator: random.Random) -> str:
    (path / "checkpoints" / "latest").write_bytes(
        generator.choice((b"", b"step_9", b"\xff\x00", b"../../x\n"))
    )
    return "garbled pointer"


def flipped_bit(checkpoint: Path, generator: random.Random) -> str:
    """One bit, anywhere in the checkpoint."""
    file = generator.choice(sorted(checkpoint.iterdir()))
    data = bytearray(file.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)
    return f"flipped bit in {file.name}"


def missing_file(checkpoint: Path, generator: random.Random) -> str:
    file = generator.choice(sorted(checkpoint.iterdir()))
    file.unlink()
    return f"{file.name} gone"


def cut_file(checkpoint: Path, generator: random.Random) -> str:
    file = generator.choice(sorted(checkpoint.iterdir()))
    os.truncate(file, file.stat().st_size // 2)
    return f"half of {file.name}"


def row(life: Life) -> str:
    codes = ",".join("?" if code is None else str(code) for code in life.codes)
    text = f"{life.run:14} {life.number:3} {'; '.join(life.faults) or '-':70.70} {life.state:11} {codes:8}"
    text += f" {life.seconds:5.1f} {life.began:3} {life.reached:3} {life.lost:3}"
    return f"{text}  WRONG: {life.wrong}" if life.wrong else text


HEADER = f"{'run':14} no. {'faults':70} {'state':11} {'status':8}   sec from to lost"


@contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """A folder on a disk that may be filled, where this user may mount one."""
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder]
        mounted = (
            shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
        )
        try:
            yield Path(folder), mounted
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="no run begins after this time (15)")
    parser.add_argument("--seed", type=int, help="of all faults; default: drawn, and printed")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each run (2)")
    parser.add_argument("--level", action="append", choices=("O0", "O1", "O2", "O3"), help="default: O2, O3")
    parser.add_argument("--json", type=Path, help="write all lives and the verdict there")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(1 << 30)
    return options


def main() -> int:
    options = parse()
    logging.getLogger("fp8train").addHandler(logging.NullHandler())  # it looks into damaged directories
    began = time.monotonic()
    with small_disk() as (folder, disk):
        soak = Soak(folder, options, disk=disk)
        print(f"seed {options.seed}; {folder}" + ("" if disk else "; no disk that may be filled"))
        print(HEADER)
        soak.run()
    minutes = (time.monotonic() - began) / 60
    faults = Counter(name.split(" ")[0].split("_step")[0] for life in soak.lives for name in life.faults)
    passed, total = sum(soak.passed.values()), len(soak.passed)
    lost = sum(life.lost for life in soak.lives)
    print("\n" + ", ".join(f"{name} {count}" for name, count in sorted(faults.items())))
    print(
        f"{total} runs of {STEPS} steps in {minutes:.1f} minutes: {len(soak.lives)} lives, "
        f"{sum(faults.values())} faults, {lost} steps repeated"
    )
    verdict = "PASSED" if passed == total else "FAILED"
    verdict += f": {passed} of {total} runs have the bits of one without faults"
    print(verdict)
    if options.json is not None:
        record = {"seed": options.seed, "minutes": round(minutes, 1), "verdict": verdict, "faults": faults}
        record["lives"] = [asdict(life) for life in soak.lives]
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passed == total else 1


if __name__ == "__main__":
    sys.exit(main())
