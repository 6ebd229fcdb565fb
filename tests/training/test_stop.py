"""Ask a run to stop: it saves at a step boundary, exits 0, and continues to the same bits."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from fp8train.checkpoint.catalog import candidates
from tests.training.launching import STEPS, finish, history, start, wait_for_step, weights, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that was never stopped, at two ranks."""
    config = write_config(tmp_path_factory.mktemp("stop"))
    finish(start(config, 2, "run.name=whole"))
    return config


@pytest.mark.parametrize(
    ("kind", "rank", "state"),
    [
        (signal.SIGTERM, 1, "preempted"),
        pytest.param(signal.SIGINT, 0, "stopped", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 1, "stopped", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, "preempted", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, 1, "preempted", marks=pytest.mark.slow),
        ("STOP", 0, "stopped"),
    ],
    ids=["sigterm", "ctrl-c", "sighup", "sigusr1", "sigusr2", "stop-file"],
)
def test_a_stopped_run_saves_exits_0_and_continues(
    config: Path, kind: signal.Signals | str, rank: int, state: str
) -> None:
    name = f"stopped_{kind}"
    directory = config.parent / name
    processes = start(config, 2, f"run.name={name}")
    wait_for_step(processes, directory / "metrics.jsonl", 5)
    if isinstance(kind, signal.Signals):  # one rank is asked, twice; all must leave at the same step
        processes[rank].send_signal(kind)
        processes[rank].send_signal(kind)
    else:
        (directory / kind).touch()
    output = finish(processes)
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == (state, 0)
    assert status["reason"] == ("STOP file" if kind == "STOP" else signal.Signals(kind).name)
    assert 5 <= status["step"] < STEPS
    assert candidates(directory / "checkpoints")[0].name == f"step_{status['step']:08d}"
    assert f"{state} at step {status['step']}: {status['reason']}" in output
    assert not (directory / "STOP").exists()

    if kind == "STOP":  # how the run was asked leaves no trace in the checkpoint
        return
    finish(start(config, 2, f"run.name={name}", "checkpoint.resume=auto"))
    assert history(directory) == history(config.parent / "whole")
    assert weights(directory) == weights(config.parent / "whole")
    assert json.loads((directory / "status.json").read_text())["state"] == "completed"


def test_a_stop_asked_for_while_the_run_is_starting_ends_it_with_a_checkpoint(config: Path) -> None:
    directory = config.parent / "early"
    processes = start(config, 1, "run.name=early")
    deadline = time.monotonic() + 60
    while not (directory / "config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    (directory / "STOP").touch()
    finish(processes)
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "STOP file")
    assert candidates(directory / "checkpoints")[0].name == f"step_{status['step']:08d}"


def test_an_existing_run_is_refused_and_told_how_to_go_on(config: Path) -> None:
    output = finish(start(config, 2, "run.name=whole"), expect=2)
    for remedy in ("checkpoint.resume=auto", "run.overwrite=true", "run.name"):
        assert remedy in output
    assert len(output.strip().splitlines()) <= 5
    assert json.loads((config.parent / "whole/status.json").read_text())["state"] == "completed"


def test_an_explicit_checkpoint_that_is_absent_is_an_error(config: Path) -> None:
    output = finish(start(config, 1, "run.name=absent", "checkpoint.resume=nowhere/step_00000007"), expect=2)
    assert "nowhere/step_00000007" in output
    assert len(output.strip().splitlines()) <= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
)
def test_any_signal_during_the_start_leaves_no_run_that_seems_to_go_on(
    config: Path, number: signal.Signals
) -> None:
    """Before torch is imported, on one rank, while the other starts too."""
    name = f"early_{number.name}"
    processes = start(config, 2, f"run.name={name}")
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline().startswith("starting ")
    processes[0].send_signal(number)
    output = finish(processes)
    status = json.loads((config.parent / name / "status.json").read_text())
    state = "stopped" if number in (signal.SIGHUP, signal.SIGINT) else "preempted"
    assert (status["state"], status["exit_code"], status["reason"]) == (state, 0, number.name)
    assert f"{state} before training began: {number.name}" in output
