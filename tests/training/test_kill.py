"""SIGKILL at random moments of a run that saves every 2 steps: it always resumes, and ends with the weights
of the run that was never killed. All 40 kills:

    python -m pytest -m slow tests/training/test_kill.py
"""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fp8train.checkpoint.catalog import candidates
from tests.training.forked import Runs, join, wait_for_the_loop
from tests.training.launching import weights, write_config

RANKS = 2
KILLED = -signal.SIGKILL


class Killable(Runs):
    """Runs at O2 that save every 2 steps."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_config(folder))
        self.seconds: dict[int, float] = {}  # that a run trains, by its steps

    def life(self, name: str, *overrides: str) -> list[BaseProcess]:
        """A start of the run ``name``."""
        settings = ["checkpoint.resume=auto", "checkpoint.interval=2", "train.eval_interval=0"]
        return self.start(name, [*settings, "precision.level=O2", *overrides], ranks=RANKS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Killable:
    return Killable(tmp_path_factory.mktemp("kill"))


def kill_until(
    runs: Killable, kills: int, seed: int, mode: str, lifetime: float, *overrides: str
) -> list[Path]:
    """Kill runs ``kills`` times in all, all ranks or one of them, at random moments of their life; resume
    each until it completes. Returns the completed runs."""
    generator = random.Random(seed)
    completed: list[Path] = []
    done, life = 0, 0
    while done < kills or life:
        name = f"{mode}{seed}_{len(completed)}"
        directory = runs.config.parent / name
        ranks = runs.life(name, *overrides)
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


def check(runs: Killable, kills: int, steps: int, mode: str) -> None:
    overrides = [f"train.steps={steps}", f"checkpoint.asynchronous={'true' if mode == 'async' else 'false'}"]
    whole = runs.config.parent / f"whole_{steps}"
    if not whole.exists():  # synchronous: shards are equal bytes in both modes
        ranks = runs.life(whole.name, f"train.steps={steps}")
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
def test_one_kill(runs: Killable, mode: str) -> None:
    check(runs, 1, 12, mode)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_twenty_kills(runs: Killable, mode: str) -> None:
    check(runs, 20, 40, mode)
