"""The time limit: what a step and a save are taken to need, and when there is no room for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from fp8train.comm.progress import Progress
from fp8train.training import time_limit
from fp8train.training.time_limit import TimeLimit, process_age_s, unmeasured_save_s


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now)


def steps(limit: TimeLimit, clock: Clock, *seconds: float) -> None:
    progress = Progress()
    progress.listeners.append(limit.listen)
    for step, took in enumerate(seconds):
        progress.enter("data", step=step)
        clock.now += took / 2
        progress.enter("forward")
        clock.now += took / 2
        progress.enter("agree")


def test_a_step_and_a_save_are_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limit = TimeLimit(10.0, age_s=100.0)  # 500 s left
    limit.save_seconds = lambda: 40.0
    assert limit.reserve_s() == 0.0
    assert not limit.is_due()
    steps(limit, clock, 60.0)
    assert limit.reserve_s() == pytest.approx(1.25 * (60 + 40))  # nothing but the first step is known
    steps(limit, clock, 4.0, 20.0, 6.0)
    assert limit.reserve_s() == pytest.approx(1.25 * (20 + 40))  # the longest but the first
    clock.now = 1000.0 + 500 - 75.1
    assert not limit.is_due()
    clock.now += 0.2
    assert limit.is_due()


def test_before_the_first_step_only_the_limit_itself_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limit = TimeLimit(1.0, age_s=59.0)
    limit.save_seconds = lambda: 1e6
    assert not limit.is_due()
    clock.now += 1.0
    assert limit.is_due()


def test_what_lies_between_boundaries_is_not_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving is reserved for on its own."""
    clock = Clock(monkeypatch)
    limit = TimeLimit(10.0, age_s=0.0)
    for _ in range(3):
        steps(limit, clock, 2.0)
        clock.now += 300.0
    assert limit.reserve_s() == pytest.approx(2.5)


def test_an_unmeasured_save_is_judged_by_the_parameters() -> None:
    # 7e9 parameters of 16 bytes over 64 ranks at 100 MB/s: 17.5 s
    assert unmeasured_save_s(7_000_000_000, 64) == pytest.approx(17.5)


def test_the_kernel_says_when_a_process_was_started() -> None:
    program = "import time; time.sleep(0.5); from fp8train.training.time_limit import process_age_s as age\n"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", f"{program}print(age())"],
        capture_output=True,
        text=True,
        check=True,
        cwd=os.getcwd(),
    )
    assert 0.45 < float(done.stdout) <= time.monotonic() - began + 0.02
    assert process_age_s() > 0


def test_an_unknown_start_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit.Path, "read_text", lambda path: "1 (a b) S")
    assert process_age_s() == 0.0
