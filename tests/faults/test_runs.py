"""Runs of two ranks that injected faults hit: how they end, and that the same command goes on to the bits of
a run that nothing happened to. The soak (tools/soak.py) does the same at random.

    python -m pytest -m "slow or not slow" tests/faults
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8train.checkpoint.catalog import candidates, step_of
from fp8train.cli import run_command
from fp8train.run_dir.metrics import read_metrics
from tests.training.forked import Runs, join
from tests.training.launching import history, weights, write_config

STEPS, INTERVAL = 10, 2
SETTINGS = [f"train.steps={STEPS}", f"checkpoint.interval={INTERVAL}", "checkpoint.resume=auto"]
SETTINGS += ["precision.level=O2", "train.eval_interval=4", "checkpoint.keep_last=3"]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(write_config(tmp_path_factory.mktemp("faults")))


def life(runs: Runs, name: str, *overrides: str, ranks: int = 2) -> list[int | None]:
    """Exit codes of the ranks of one start."""
    return join(runs.start(name, [*SETTINGS, *overrides], ranks=ranks))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """The run that nothing happens to."""
    assert life(runs, "whole") == [0, 0], runs.log("whole")
    return runs.config.parent / "whole"


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def events(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def assert_the_same(run: Path, whole: Path) -> None:
    assert status(run)["state"] == "completed"
    assert history(run) == history(whole)
    assert weights(run, STEPS) == weights(whole, STEPS)
    assert not list((run / "checkpoints").glob("*.tmp"))


@slow
@pytest.mark.parametrize(
    ("kind", "rank", "step", "phase", "code"),
    [
        ("exception", 1, 8, "evaluate", 1),
        ("exception", 0, 7, "report", 1),
        ("exit", 1, 7, "optimizer", 9),
        ("segfault", 1, 7, "backward", -signal.SIGSEGV),
        ("oom_host", 1, 7, "forward", 2),
        ("sigkill", 0, 7, "reduce", -signal.SIGKILL),
        ("sigkill", 1, 8, "save_data", -signal.SIGKILL),
        ("sigkill", 0, 8, "save_pointer", -signal.SIGKILL),
        ("exception", 0, 8, "save_begin", 1),
        ("exception", 0, 8, "save_manifest", 1),
    ],
)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_fault_costs_the_steps_since_the_last_checkpoint(
    runs: Runs, whole: Path, kind: str, rank: int, step: int, phase: str, code: int, mode: str
) -> None:
    name = f"{kind}_{phase}_{mode}"
    fault = f"{{kind: {kind}, rank: {rank}, step: {step}, phase: {phase}{', status: 9' * (kind == 'exit')}}}"
    command = [f"debug.fault_injection=[{fault}]", f"checkpoint.asynchronous={str(mode == 'async').lower()}"]
    codes, run = life(runs, name, *command), runs.config.parent / name
    assert codes[rank] == code, runs.log(name)
    assert codes[1 - rank] not in (0, None), runs.log(name)
    if kind in ("exception", "oom_host"):
        said = f"injected fault: {kind} at rank {rank}, step {step}, {phase}"
        if kind == "oom_host":
            said = f"rank {rank} ran out of CPU memory in step {step}"
        assert said in status(run)["reason"]
        assert status(run)["state"] == "failed"
        if not phase.startswith("save_"):  # a failed save is every rank's
            assert status(run)["rank"] == rank
    saved = [step_of(path) for path in candidates(run / "checkpoints")]
    assert 4 in saved  # and 6, unless it is still being written in the background
    assert life(runs, name, *command) == [0, 0], runs.log(name)
    (resumed,) = events(run, "resumed")
    assert step - 1 - resumed["step"] <= (INTERVAL if mode == "sync" else 2 * INTERVAL)
    assert_the_same(run, whole)


@slow
@pytest.mark.parametrize("kind", ["sigterm", "sigint"])
@pytest.mark.parametrize("phase", ["forward", "optimizer", "evaluate", "save_data", "save_pointer"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_stop_in_any_phase_is_one_save(runs: Runs, whole: Path, kind: str, phase: str, mode: str) -> None:
    name = f"{kind}_{phase}_{mode}"
    command = [f"debug.fault_injection=[{{kind: {kind}, rank: 0, step: 4, phase: {phase}}}]"]
    command.append(f"checkpoint.asynchronous={str(mode == 'async').lower()}")
    run = runs.config.parent / name
    assert life(runs, name, *command) == [0, 0], runs.log(name)
    ended = status(run)
    assert ended["state"] == ("preempted" if kind == "sigterm" else "stopped")
    assert ended["reason"] == kind.upper()
    assert 4 <= ended["step"] <= 7
    saved = [event["step"] for event in events(run, "checkpoint")]
    assert saved[-1] == ended["step"] == step_of(candidates(run / "checkpoints")[0])
    assert len(saved) == len(set(saved))
    assert life(runs, name, *command) == [0, 0], runs.log(name)
    assert_the_same(run, whole)


@pytest.fixture
def small_disk(runs: Runs) -> Iterator[Path]:
    mount = runs.config.parent / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        mount.rmdir()
        pytest.skip("needs the right to mount a tmpfs: run as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
    mount.rmdir()


@slow
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_run_goes_on_where_a_disk_was_full(
    runs: Runs, whole: Path, small_disk: Path, policy: str, mode: str
) -> None:
    fault = "{kind: disk_full, step: 6, phase: save, steps: 2}"
    command = [f"run.dir={small_disk}", f"debug.fault_injection=[{fault}]", f"checkpoint.on_failure={policy}"]
    command.append(f"checkpoint.asynchronous={str(mode == 'async').lower()}")
    codes, run = life(runs, "full", *command), small_disk / "full"
    if policy == "stop":
        assert codes == [2, 2], runs.log("full")
        assert (run / "checkpoints" / "latest").read_text() == "step_00000004\n"
        assert not list((run / "checkpoints").glob("*.tmp"))
        (run / "faults" / "filler").unlink()
        codes = life(runs, "full", *command)
    else:
        metrics = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
        assert set(metrics) >= {1, 2, 3, 4, 5, 8, 9, 10}  # lines of a full disk are lost, with a warning
    assert codes == [0, 0], runs.log("full")
    assert weights(run, STEPS) == weights(whole, STEPS)
    assert status(run)["state"] == "completed"


@slow
def test_a_flipped_bit_of_one_replica_ends_the_run(runs: Runs) -> None:
    flip = (
        "{kind: bit_flip_weight, rank: 1, step: 3, phase: report, name: layers.1.mlp.up.weight, element: 77}"
    )
    command = [f"debug.fault_injection=[{flip}]", "train.consistency_interval=1", "train.global_batch_size=6"]
    assert life(runs, "flipped", *command, ranks=3) == [4, 4, 4], runs.log("flipped")
    said = status(runs.config.parent / "flipped")
    assert (said["step"], said["exit_code"]) == (3, 4)
    assert "data-parallel rank 1: layers.1.mlp.up.weight" in said["reason"]


@pytest.mark.parametrize(
    ("split", "told"),
    [("[1, 0, 0]", "there is no validation data"), ("[0.98, 0.02, 0]", "valid: 1 documents")],
)
def test_without_validation_data_nothing_begins(
    runs: Runs, split: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(runs.config), f"run.dir={runs.config.parent}", "run.name=empty", *SETTINGS]
    assert run_command([*words, f"data.split={split}", "train.global_batch_size=64"]) == 2
    assert told in capsys.readouterr().err
    assert not (runs.config.parent / "empty").exists()
