"""What a run does about checkpoints: failures by policy, what is kept, what is checked before a load."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp8train.checkpoint import save as save_module
from fp8train.checkpoint.background import BackgroundSaver, Written
from fp8train.checkpoint.catalog import step_of
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CheckpointError
from fp8train.cli import run_command
from fp8train.training.signals import Stop, StopRequest
from fp8train.training.strikes import InjectedFaultError
from tests.training.launching import write_config

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = pytest.mark.parametrize("mode", ["sync", "async"])
MOSTLY_ASYNC = pytest.mark.parametrize("mode", [pytest.param("sync", marks=pytest.mark.slow), "async"])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("saving"))


def train(config: Path, name: str, mode: str, *overrides: str) -> tuple[int, Path]:
    """Train 8 steps in this process, saving every 2; exit status and run directory."""
    words = ["train", str(config), f"run.dir={config.parent}", f"run.name={name}", "train.steps=8"]
    words += ["checkpoint.interval=2", "train.eval_interval=0", "train.global_batch_size=4"]
    words += ["logging.cast_statistics_interval=0", "checkpoint.keep_last=9"]
    words += [] if mode == "none" else [f"checkpoint.asynchronous={'true' if mode == 'async' else 'false'}"]
    return run_command([*words, *overrides]), config.parent / name


NO_ROOM = "no room for the checkpoint of step 4; lower checkpoint.keep_last"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def steps(run: Path) -> list[int]:
    return sorted(step_of(path) or -1 for path in (run / "checkpoints").glob("step_*"))


def fail_at(monkeypatch: pytest.MonkeyPatch, *steps: int, error: type[Exception] = CheckpointError) -> None:
    """Saves of these steps find the disk full."""
    original: Callable[[save_module.Order, int], None] = save_module._check_space

    def check(order: save_module.Order, needed: int) -> None:
        if order.step in steps:
            raise error(f"no room for the checkpoint of step {order.step}; lower `keep_last`")
        original(order, needed)

    monkeypatch.setattr(save_module, "_check_space", check)


@MODES
def test_a_failed_save_stops_the_run(
    config: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, 4)
    status, run = train(config, f"stop_{mode}", mode)
    assert status == 2
    assert f"error: {NO_ROOM}\n" in capsys.readouterr().err
    record = json.loads((run / "status.json").read_text())
    assert (record["state"], record["exit_code"], record["message"]) == ("failed", 2, NO_ROOM)
    assert 4 <= record["step"] <= 6
    assert steps(run) == [2]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert not list((run / "checkpoints").glob("*.tmp"))
    monkeypatch.undo()
    status, _ = train(config, f"stop_{mode}", mode, "checkpoint.resume=auto")
    assert (status, steps(run)) == (0, [2, 4, 6, 8])


@MODES
def test_a_failed_save_is_tried_again_at_the_next_interval(
    config: Path, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(monkeypatch, 4)
    with caplog.at_level(logging.WARNING):
        status, run = train(config, f"continue_{mode}", mode, "checkpoint.on_failure=continue")
    assert status == 0
    assert steps(run) == [2, 6, 8]
    (failure,) = events(run, "checkpoint_failed")
    assert failure["step"] == 4
    assert failure["error"] == NO_ROOM
    assert f"CHECKPOINT OF STEP 4 NOT SAVED: {NO_ROOM}" in caplog.text
    assert [event["step"] for event in events(run, "checkpoint")] == [2, 6, 8]


@MOSTLY_ASYNC
def test_a_last_save_that_fails_is_an_error_whatever_the_policy(
    config: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 8)
    status, run = train(config, f"last_{mode}", mode, "checkpoint.on_failure=continue")
    assert status == 2
    assert steps(run) == [2, 4, 6]


def test_a_bug_in_the_writer_is_no_failed_save(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 4, error=ZeroDivisionError)
    with pytest.raises(Exception, match="step 4"):
        train(config, "bug", "async", "checkpoint.on_failure=continue")


@MOSTLY_ASYNC
def test_what_is_reported(config: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = train(config, f"report_{mode}", mode)
    saved = events(run, "checkpoint")
    assert [event["step"] for event in saved] == [2, 4, 6, 8]
    for event in saved:
        files = list(Path(event["path"]).iterdir())
        assert event["bytes"] == sum(file.stat().st_size for file in files)
        assert event["seconds"] > 0
        assert event["stall_seconds"] <= event["seconds"] or mode == "async"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ages = [row["checkpoint/age_seconds"] for row in rows]
    assert all(age > 0 for age in ages)
    told = [row for row in rows if "checkpoint/bytes" in row]
    assert 1 <= len(told) <= 3  # of the last one there is the event alone
    assert told[0]["checkpoint/bytes"] == saved[0]["bytes"]
    assert told[0]["checkpoint/stall_seconds"] == pytest.approx(saved[0]["stall_seconds"], abs=1e-3)
    assert told[0]["checkpoint/write_seconds"] == pytest.approx(saved[0]["seconds"], abs=1e-3)
    output = capsys.readouterr().out
    assert output.count("in the background; training stood still for") == (4 if mode == "async" else 0)
    assert output.count("asynchronous checkpoints keep") == (1 if mode == "async" else 0)


def test_a_second_save_waits_for_the_first(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for = threading.Event()
    digest, wait = save_module._digest_own_shards, BackgroundSaver.wait

    def when_waited_for(order: save_module.Order, rank: int) -> dict[str, Any]:
        assert waited_for.wait(60)
        return digest(order, rank)

    def waiting(saver: BackgroundSaver) -> Written | None:
        waited_for.set()
        return wait(saver)

    monkeypatch.setattr(save_module, "_digest_own_shards", when_waited_for)
    monkeypatch.setattr(BackgroundSaver, "wait", waiting)
    status, run = train(config, "waits", "async", "train.steps=4")
    assert (status, steps(run)) == (0, [2, 4])
    (waited,) = events(run, "checkpoint_waited")
    assert (waited["step"], waited["previous"]) == (4, 2)
    first, second = events(run, "checkpoint")
    assert second["stall_seconds"] >= waited["seconds"]
    assert first["stall_seconds"] < first["seconds"]


def test_a_run_that_fails_lets_the_write_finish(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    digest, abandon = save_module._digest_own_shards, BackgroundSaver.abandon

    def after_the_failure(order: save_module.Order, rank: int) -> dict[str, Any]:
        assert failed.wait(60)
        return digest(order, rank)

    def abandoned(saver: BackgroundSaver, *, grace_s: float) -> Written | None:
        assert grace_s == 30
        failed.set()
        return abandon(saver, grace_s=grace_s)

    monkeypatch.setattr(save_module, "_digest_own_shards", after_the_failure)
    monkeypatch.setattr(BackgroundSaver, "abandon", abandoned)
    with pytest.raises(InjectedFaultError):
        train(config, "fails", "async", "debug.fault_injection=[{kind: exception, step: 4, phase: data}]")
    run = config.parent / "fails"
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002\n"
    assert [event["step"] for event in events(run, "checkpoint")] == [2]


def test_a_stop_waits_for_the_write(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, None, None, None, Stop("stopped", "STOP file")])  # twice before the first step
    monkeypatch.setattr(StopRequest, "agree", lambda stop, group: next(answers))
    digest = save_module._digest_own_shards

    def slowly(order: save_module.Order, rank: int) -> dict[str, Any]:
        time.sleep(0.3)
        return digest(order, rank)

    monkeypatch.setattr(save_module, "_digest_own_shards", slowly)
    status, run = train(config, "stopped", "async")
    assert (status, steps(run)) == (0, [2, 3])
    assert (run / "checkpoints" / "latest").read_text() == "step_00000003\n"
    assert [event["step"] for event in events(run, "checkpoint")] == [2, 3]
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def test_a_run_that_saves_nothing(config: Path) -> None:
    overrides = ["checkpoint.interval=0", "checkpoint.save_at_end=false", "train.steps=2"]
    status, run = train(config, "nothing", "none", *overrides)
    assert (status, steps(run)) == (0, [])


def test_kept_by_step_and_by_loss(config: Path) -> None:
    rules = ["checkpoint.keep_last=1", "checkpoint.keep_every=6", "checkpoint.keep_best=1"]
    status, run = train(
        config, "kept", "sync", *rules, "train.steps=10", "train.eval_interval=4", "optimizer.lr=0.3"
    )
    assert status == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert sorted(losses) == [4, 8, 10]
    best = min(losses, key=lambda step: losses[step])
    assert steps(run) == sorted({6, best, 10})
    for path in (run / "checkpoints").glob("step_*"):
        assert read_meta_file(path)[1]["eval_loss"] == losses.get(step_of(path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["checkpoint.keep_best=1"],
            "checkpoint.keep_best, train.eval_interval: has no effect: train.eval_interval is 0",
        ),
        (
            ["checkpoint.keep_best=1", "train.eval_interval=7"],
            "no step before the end (8) is both saved (checkpoint.interval: 2) and evaluated",
        ),
        (
            ["checkpoint.keep_best=1", "train.eval_interval=2", "checkpoint.interval=0"],
            "checkpoint.keep_best, checkpoint.interval: has no effect: checkpoint.interval is 0",
        ),
        (["checkpoint.keep_every=-1"], "checkpoint.keep_every"),
        (["checkpoint.on_failure=ignore"], "checkpoint.on_failure"),
        (["checkpoint.verify=none"], "checkpoint.verify"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    config: Path, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, run = train(config, "refused", "sync", *overrides)
    assert status == 2
    assert words in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("verify", ["full", "size"])
def test_the_setting_verify_is_honoured(
    config: Path, verify: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fp8train.checkpoint.manifest._ALWAYS_HASHED_BYTES", 0)
    _, run = train(config, f"verify_{verify}", "sync", "train.steps=4")
    shard = run / "checkpoints" / "step_00000004" / "__0_0.distcp"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # a number: nothing but the hash can tell
    shard.write_bytes(bytes(damaged))
    overrides = ["checkpoint.resume=auto", f"checkpoint.verify={verify}", "train.steps=6"]
    overrides += ["checkpoint.accept_changes=[train.steps]"]
    status, _ = train(config, f"verify_{verify}", "sync", *overrides)
    assert status == 0
    assert events(run, "resumed")[-1]["step"] == (2 if verify == "full" else 4)
