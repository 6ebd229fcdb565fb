"""SIGKILL at random moments of a run that saves every 2 steps: it always resumes, and ends with the weights
of the run that was never killed. All 40 kills:

    python -m pytest -m slow tests/training/test_kill.py

Ranks are forked from a server that has imported torch, so that a life lasts about as long as its steps do.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fp8train.checkpoint.catalog import candidates
from tests.free_ports import free_ports
from tests.training.launching import weights, write_config

RANKS = 2
KILLED = -signal.SIGKILL


def _rank(environment: dict[str, str], log: str, words: list[str]) -> None:
    """Life of a rank."""
    os.environ.update(environment)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    from fp8train.cli import run_command

    status = run_command(words)
    sys.stdout.flush()
    os._exit(status)


class Runs:
    """Starts ranks of one configuration."""

    def __init__(self, folder: Path) -> None:
        self.config = write_config(folder)
        self.seconds: dict[int, float] = {}  # that a run trains, by its steps
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fp8train.training.run", "fp8train.cli"])

    def start(self, name: str, *overrides: str) -> list[BaseProcess]:
        (port,) = free_ports(1)
        shared = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["train", str(self.config), f"run.dir={self.config.parent}", f"run.name={name}"]
        words += ["checkpoint.resume=auto", "checkpoint.interval=2", "train.eval_interval=0", "run.threads=1"]
        words += ["precision.level=O2", *overrides]
        ranks = []
        for rank in range(RANKS):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = str(self.config.parent / f"{name}.{rank}.log")
            ranks.append(self.context.Process(target=_rank, args=(environment, log, words), daemon=True))
            ranks[-1].start()
        return ranks

    def log(self, name: str) -> str:
        return (self.config.parent / f"{name}.0.log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("kill"))


def join(ranks: list[BaseProcess], seconds: float = 120.0) -> list[int | None]:
    """Exit codes; a rank that hangs is None."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def wait_for_the_loop(ranks: list[BaseProcess], directory: Path) -> None:
    """Until then there is nothing to hurt. A run that is resumed says so in its status too."""
    status = directory / "status.json"
    began = time.time()
    while all(rank.is_alive() for rank in ranks) and time.time() - began < 120:
        if status.exists() and status.stat().st_mtime > began and '"time"' in status.read_text():
            return
        time.sleep(0.002)


def kill_until(runs: Runs, kills: int, seed: int, mode: str, lifetime: float, *overrides: str) -> list[Path]:
    """Kill runs ``kills`` times in all, all ranks or one of them, at random moments of their life; resume
    each until it completes. Returns the completed runs."""
    generator = random.Random(seed)
    completed: list[Path] = []
    done, life = 0, 0
    while done < kills or life:
        name = f"{mode}{seed}_{len(completed)}"
        directory = runs.config.parent / name
        ranks = runs.start(name, *overrides)
        if done < kills:
            wait_for_the_loop(ranks, directory)
            # Chooses the moment; nothing is asserted about it. Short lives: some steps, then killed again.
            time.sleep(generator.uniform(0, lifetime / 6))
            one = generator.random() < 0.25
            victims = [generator.choice(ranks)] if one else ranks
            for victim in victims:
                if victim.is_alive():
                    os.kill(victim.pid or 0, signal.SIGKILL)
        codes = join(ranks)
        assert None not in codes, f"seed {seed}: a rank hangs after its peer was killed\n{runs.log(name)}"
        if codes == [0] * RANKS:
            completed.append(directory)
            life = 0
        else:
            assert KILLED in codes, f"seed {seed}: {codes}\n{runs.log(name)}"
            done, life = done + 1, life + 1
            assert all(path.name.startswith("step_") for path in candidates(directory / "checkpoints"))
    print(f"{mode}: {done} kills, {len(completed)} runs completed, seed {seed}")
    return completed


def check(runs: Runs, kills: int, steps: int, mode: str) -> None:
    overrides = [f"train.steps={steps}", f"checkpoint.asynchronous={'true' if mode == 'async' else 'false'}"]
    whole = runs.config.parent / f"whole_{steps}"
    if not whole.exists():  # synchronous: shards are equal bytes in both modes
        ranks = runs.start(whole.name, f"train.steps={steps}")
        wait_for_the_loop(ranks, whole)
        began = time.monotonic()
        assert join(ranks) == [0, 0], runs.log(whole.name)
        runs.seconds[steps] = time.monotonic() - began
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    expected = weights(whole, steps)
    for completed in kill_until(runs, kills, seed, mode, runs.seconds[steps], *overrides):
        assert weights(completed, steps) == expected, f"seed {seed}: {completed.name}"
        assert not list((completed / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("mode", ["async", pytest.param("sync", marks=pytest.mark.slow)])
def test_one_kill(runs: Runs, mode: str) -> None:
    check(runs, 1, 12, mode)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_twenty_kills(runs: Runs, mode: str) -> None:
    check(runs, 20, 40, mode)
