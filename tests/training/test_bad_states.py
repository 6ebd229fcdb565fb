"""Runs that go back by path, and runs whose weights become NaN: what they save, keep and continue from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.checkpoint.description import read_meta_file
from fp8train.step.result import StepResult
from fp8train.step.trainer import Trainer
from fp8train.training.signals import Stop, StopRequest
from tests.training.launching import weights, write_config
from tests.training.test_saving import events, steps, train

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = Trainer.step


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("states"))


def logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def fail_in(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def failing(trainer: Trainer, step: int, batch: Tensor) -> StepResult:
        if step == number:
            raise ZeroDivisionError("as good as a kill")
        return STEP(trainer, step, batch)

    monkeypatch.setattr(Trainer, "step", failing)


def test_a_rollback_outlives_a_kill_and_is_carried_out_once(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = train(config, "back", "none")
    whole, bits = losses(run), weights(run, 8)
    there = run / "checkpoints" / "step_00000004"
    fail_in(monkeypatch, 5)  # before the first save after the rollback
    with pytest.raises(ZeroDivisionError):
        train(config, "back", "none", f"checkpoint.resume={there}")
    monkeypatch.undo()
    names = sorted(path.name for path in (run / "checkpoints").glob("*.abandoned"))
    assert names == ["step_00000006.abandoned", "step_00000008.abandoned"]
    assert logged(run) == [1, 2, 3, 4, 5]
    fail_in(monkeypatch, 7)
    with pytest.raises(ZeroDivisionError):
        train(config, "back", "none", "checkpoint.resume=auto")
    monkeypatch.undo()
    assert [event["step"] for event in events(run, "resumed")][-1] == 4
    status, _ = train(config, "back", "none", f"checkpoint.resume={there}")  # as a scheduler would
    assert status == 0
    assert [event["step"] for event in events(run, "resumed")][-1] == 6
    assert logged(run) == list(range(1, 9))
    assert (losses(run), weights(run, 8)) == (whole, bits)


def poison(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def poisoned(trainer: Trainer, step: int, batch: Tensor) -> StepResult:
        if step == number:
            states = trainer.optimizer.states.tensors()
            master = next(t for name, t in states.items() if name.startswith("master/") and "mlp" in name)
            with torch.no_grad():
                master.view(-1)[0] = float("nan")
            trainer._publish()
        return STEP(trainer, step, batch)

    monkeypatch.setattr(Trainer, "step", poisoned)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_weights_that_are_not_finite_replace_no_good_checkpoint(
    config: Path, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("checkpoint.keep_last=1", "train.steps=10", "train.max_skipped_steps=9")
    poison(monkeypatch, 5)
    status, run = train(config, f"nan_{mode}", mode, *settings)
    assert status == 3
    assert steps(run) == [4]
    assert [event["step"] for event in events(run, "checkpoint_postponed")] == [6]
    assert [event["step"] for event in events(run, "checkpoint_not_finite")] == [10]
    assert "CHECKPOINT OF STEP 10 NOT SAVED" in caplog.text
    assert "elements are NaN or infinite" in caplog.text
    monkeypatch.undo()
    _, meta = read_meta_file(run / "checkpoints" / "step_00000004")
    assert meta["finite"] is True
    assert meta["last_step"]["applied"] is True
    assert meta["last_step"]["grad_norm"] > 0
    status, _ = train(config, f"nan_{mode}", mode, *settings, "checkpoint.resume=auto")
    assert status == 0
    assert logged(run) == list(range(1, 11))


def skip_in(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """These steps have a gradient that is not finite, and the weights are as good as before."""
    from dataclasses import replace

    def skipping(trainer: Trainer, step: int, batch: Tensor) -> Any:
        if step not in numbers:
            return STEP(trainer, step, batch)
        return replace(STEP(trainer, step, batch), skipped="not_finite")

    monkeypatch.setattr(Trainer, "step", skipping)


def test_a_save_waits_for_a_step_that_is_applied(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_in(monkeypatch, 3, 4)
    status, run = train(config, "waits", "none")
    assert (status, steps(run)) == (0, [2, 6, 8])
    assert [event["step"] for event in events(run, "checkpoint_postponed")] == [4]


def test_a_stop_among_skipped_steps_saves_what_is_finite(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_in(monkeypatch, 2)
    answers = iter([None, None, None, None, Stop("stopped", "STOP file")])  # twice before the first step
    monkeypatch.setattr(StopRequest, "agree", lambda stop, group: next(answers))
    status, run = train(config, "stops", "none")
    assert (status, steps(run)) == (0, [2, 3])
    assert read_meta_file(run / "checkpoints" / "step_00000003")[1]["last_step"]["applied"] is False


def test_a_stop_with_weights_that_are_not_finite_ends_without_a_checkpoint(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    answers = iter([None, None, None, None, Stop("stopped", "STOP file")])
    monkeypatch.setattr(StopRequest, "agree", lambda stop, group: next(answers))
    status, run = train(config, "stops_nan", "none")
    assert (status, steps(run)) == (0, [2])
    assert [event["step"] for event in events(run, "checkpoint_not_finite")] == [3]
