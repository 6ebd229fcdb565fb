"""How long a rank takes without waiting, and who is told to be slow."""

from __future__ import annotations

import time

import pytest
import torch

from fp8train.comm.calls import Calls
from fp8train.comm.processes import Layout, joined_processes
from fp8train.comm.progress import Progress
from fp8train.watch.stragglers import PATIENCE, StepClock, Stragglers, ratios_to_stage

CPU = torch.device("cpu")


def at(progress: Progress, phase: str, now: float) -> None:
    """A phase begins at a moment of our choice: listeners see it as if it were one of the clock's."""
    listeners, progress.listeners = progress.listeners, []
    progress.enter(phase)  # type: ignore[arg-type]
    progress.since, progress.listeners = now, listeners
    for listener in listeners:
        listener(progress)


def test_waiting_for_others_is_no_time_of_ones_own() -> None:
    progress, calls = Progress(), Calls()
    clock = StepClock(progress, calls, CPU)
    for began, waited in ((10.0, 3.0), (20.0, 1.0)):
        at(progress, "data", began)
        at(progress, "forward", began + 1)
        calls.waited_s += waited
        at(progress, "report", began + 5)
        calls.waited_s += 100.0  # between steps
    assert clock.take() == pytest.approx(((5 - 3) + (5 - 1)) / 2)
    assert clock.take() == 0.0


def test_waits_of_collectives_are_counted_and_computing_within_is_not() -> None:
    calls = Calls()
    group = calls.group("pp schedule", (0, 1))
    began = time.perf_counter()
    with group.held("states"):
        time.sleep(0.05)
        with group.not_waiting():
            assert group.waiting is None
            inside = time.perf_counter()
            time.sleep(0.05)
            inside = time.perf_counter() - inside
        assert group.waiting is not None
    outside = time.perf_counter() - began
    assert calls.waited_s == pytest.approx(outside - inside, abs=2e-3)
    assert (group.entered, group.left, calls.moves) == (1, 1, 2)


def test_a_rank_is_compared_with_its_stage() -> None:
    ratios = ratios_to_stage([1.0, 1.5, 4.0, 4.0], [0, 0, 1, 1])
    assert ratios == {0: 1.0, 1: 1.5, 2: 1.0, 3: 1.0}


def logged_steps(group, rank, world_size, slow_for):
    """Runs in the pool: rank 2 takes half as long again for as many logged steps as ``slow_for`` says."""
    progress = Progress()
    stragglers = Stragglers(progress, joined_processes(CPU, Layout(tp=2)), counted=True)
    told, metrics = [], []
    for step in range(PATIENCE + 2):
        at(progress, "data", 0.0)
        at(progress, "report", 3.0 if rank == 2 and step < slow_for else 2.0)
        metrics.append(stragglers.metrics())
        told.append([(slow.rank, slow.ratio) for slow in stragglers.newly_slow()])
    return told, metrics[0]


def test_a_rank_that_stays_slow_is_told_once(gloo_pool) -> None:
    for told, metrics in gloo_pool.run(logged_steps, 4, PATIENCE + 2):
        assert told == [[]] * (PATIENCE - 1) + [[(2, 1.5)]] + [[]] * 2
        assert metrics == {
            "time/step_min_s": 2.0,
            "time/step_median_s": 2.0,
            "time/step_max_s": 3.0,
            "time/slowest_rank": 2.0,
        }
    for told, _ in gloo_pool.run(logged_steps, 4, PATIENCE - 1):
        assert told == [[]] * (PATIENCE + 2)
