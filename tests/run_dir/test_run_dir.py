"""The run directory: who may use it, what is deleted, and what a resumed run keeps."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.catalog import find_checkpoint
from fp8train.checkpoint.save import save_checkpoint
from fp8train.config.errors import UserError
from fp8train.run_dir.claim import RunDirError
from fp8train.run_dir.directory import RunDir
from fp8train.run_dir.provenance import describe_environment


def _open(base: Path, name: str = "exp", *, resume: str = "never", overwrite: bool = False) -> RunDir:
    return RunDir.open(base, name, resume=resume, overwrite=overwrite, group=None)


def _finished_run(base: Path, name: str = "exp") -> Path:
    run = _open(base, name)
    run.write_description("model: {}\n", {"versions": {}})
    for step in (1, 2, 3):
        run.log_metrics({"step": step, "loss": 1.0 / step})
        run.log_event("saved", step=step)
    save_checkpoint(run.checkpoints, 2, {"x": torch.ones(2)}, meta={}, rank_state={}, group=None, keep_last=2)
    run.write_status("completed", step=3, reason="all steps done", exit_code=0)
    run.close()
    return run.path


def _tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "run.lock"
    }


def test_a_new_run_has_everything(tmp_path: Path) -> None:
    run = _open(tmp_path / "deep" / "runs")
    assert run.path == tmp_path / "deep" / "runs" / "exp"
    assert not run.continued
    assert {entry.name for entry in run.path.iterdir()} == {
        "run.lock",
        "status.json",
        "heartbeats",
        "checkpoints",
        "logs",
        "tb",
    }
    assert json.loads((run.path / "status.json").read_text())["state"] == "running"
    run.close()


def test_records(tmp_path: Path) -> None:
    run = _open(tmp_path)
    run.write_description("a: 1\n", {"host": "ü"})
    run.log_metrics({"step": 1, "train/loss": float("nan"), "optim/grad_norm": float("inf")})
    run.log_event("evaluated", step=1, loss=2.5)
    run.write_status("failed", step=1, reason="loss is NaN", exit_code=3)
    run.log("first line\nsecond ü \udcff line")
    assert run.config_file.read_text() == "a: 1\n"
    assert json.loads((run.path / "env.json").read_text()) == {"host": "ü"}
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert math.isnan(json.loads(line)["train/loss"])
    assert json.loads(line)["optim/grad_norm"] == math.inf
    event = json.loads((run.path / "events.jsonl").read_text())
    assert (event["kind"], event["step"], event["loss"]) == ("evaluated", 1, 2.5)
    assert event["time"] > 1.7e9
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"], status["exit_code"]) == (
        "failed",
        1,
        "loss is NaN",
        3,
    )
    log = (run.path / "logs" / "rank0.log").read_text().splitlines()
    assert log[0].endswith("Z first line")
    assert log[1].endswith("Z second ü \\udcff line")
    run.close()


def test_other_ranks_write_only_their_log(tmp_path: Path) -> None:
    run = _open(tmp_path)
    before = _tree(run.path)
    other = replace(run, rank=3, lock_fd=None)
    other.write_description("x", {})
    other.write_status("failed", step=9)
    other.log_metrics({"step": 1})
    other.log_event("x", step=1)
    other.truncate_after(None)
    run.stop_file.touch()
    other.clear_stop()
    assert run.stop_file.exists()
    run.clear_stop()
    assert not run.stop_file.exists()
    assert _tree(run.path) == before
    other.log("here")
    assert set(_tree(run.path)) - set(before) == {"logs/rank3.log"}
    other.close()
    run.close()


# ---- an existing run (refused, continued, overwritten)


def test_an_existing_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    path = _finished_run(tmp_path)
    before = _tree(path)
    with pytest.raises(RunDirError) as caught:
        _open(tmp_path)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.splitlines()) <= 5
    assert isinstance(caught.value, UserError)
    for way_out in ("checkpoint.resume=auto", "run.overwrite=true", "run.name="):
        assert way_out in text
    assert _tree(path) == before
    _open(tmp_path, resume="auto").close()  # the refusal left no lock behind


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_that_died_before_its_first_step_leaves_its_name_free(tmp_path: Path, resume: str) -> None:
    _open(tmp_path).close()
    (tmp_path / "exp" / "STOP").touch()
    again = _open(tmp_path, resume=resume)
    assert not again.continued
    assert not again.stop_file.exists()
    again.write_description("a: 1\n", {})
    again.close()
    with pytest.raises(RunDirError, match="already holds a run"):
        _open(tmp_path)


def test_resume_auto_continues_and_forgets_an_old_stop(tmp_path: Path) -> None:
    path = _finished_run(tmp_path)
    before = _tree(path)
    (path / "STOP").touch()
    run = _open(tmp_path, resume="auto")
    assert run.continued
    assert not run.stop_file.exists()
    after = _tree(path)
    status = json.loads(after.pop("status.json"))
    assert (status["state"], status["step"], status["exit_code"]) == ("running", 3, None)
    del before["status.json"]
    assert after == before
    assert find_checkpoint(run.checkpoints, "auto") == path / "checkpoints" / "step_00000002"
    run.close()
    assert not _open(tmp_path, "other", resume="auto").continued


def test_resume_from_a_path(tmp_path: Path) -> None:
    path = _finished_run(tmp_path)
    inside = str(path / "checkpoints" / "step_00000002")
    run = _open(tmp_path, resume=inside)
    assert run.continued
    run.close()
    assert not _open(tmp_path, "branch", resume=inside).continued
    _finished_run(tmp_path, "third")
    with pytest.raises(RunDirError, match="already holds a run"):
        _open(tmp_path, "third", resume=inside)


def test_overwrite_deletes_the_run_and_keeps_the_rest(tmp_path: Path) -> None:
    path = _finished_run(tmp_path)
    (path / "notes.txt").write_text("mine")
    (path / "checkpoints" / "best").mkdir()
    (path / "checkpoints" / "best" / "w").write_text("mine")
    (path / "STOP").touch()
    run = _open(tmp_path, overwrite=True)
    assert not run.continued
    assert set(_tree(path)) == {"notes.txt", "checkpoints/best/w", "status.json", "logs/rank0.log"}
    assert json.loads((path / "status.json").read_text())["state"] == "running"
    assert find_checkpoint(run.checkpoints, "auto") is None
    run.close()


def test_overwrite_never_follows_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "logs").mkdir(parents=True)
    (outside / "logs" / "data").write_text("keep me")
    (outside / "step_00000001").mkdir()
    (outside / "step_00000001" / "data").write_text("keep me")
    before = _tree(outside)
    path = _finished_run(tmp_path)
    shutil.rmtree(path / "logs")
    shutil.rmtree(path / "checkpoints")
    (path / "logs").symlink_to(outside / "logs")
    (path / "checkpoints").symlink_to(outside)
    (path / "report.html").symlink_to(outside / "logs" / "data")
    run = _open(tmp_path, overwrite=True)
    assert _tree(outside) == before
    assert not (path / "checkpoints").is_symlink()
    assert not (path / "logs").is_symlink()
    run.close()
    (tmp_path / "linked").symlink_to(path)
    with pytest.raises(RunDirError, match="symbolic link"):
        _open(tmp_path, "linked", overwrite=True)
    assert (path / "status.json").exists()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    (thesis / "checkpoints").mkdir(parents=True)
    (thesis / "config.yaml").write_text("mine")
    before = _tree(thesis)
    for settings in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(RunDirError, match="not empty and not a run directory"):
            _open(tmp_path, "thesis", **settings)
    assert _tree(thesis) == before
    assert not (thesis / "run.lock").exists()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    path = _finished_run(tmp_path)
    with pytest.raises(RunDirError, match="set one of them"):
        _open(tmp_path, resume="auto", overwrite=True)
    with pytest.raises(RunDirError, match="would delete the checkpoint"):
        _open(tmp_path, resume=str(path / "checkpoints"), overwrite=True)
    assert (path / "checkpoints" / "step_00000002").is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/abs"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunDirError, match="must be a plain name"):
        _open(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


# ---- not writable, in use


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match=r"cannot be written .*set run\.dir"):
        _open(tmp_path / "file" / "runs")


def test_a_file_system_that_takes_no_directories() -> None:
    with pytest.raises(RunDirError, match=r"run directory /proc/self/exp cannot be written"):
        _open(Path("/proc/self"))


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    _finished_run(mount)
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_read_only_file_system(read_only_disk: Path) -> None:
    for name in ("exp", "new"):
        with pytest.raises(RunDirError, match="the file system is read-only"):
            _open(read_only_disk, name, resume="auto")


def test_two_jobs_cannot_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run = _open(tmp_path)
    for settings in ({}, {"resume": "auto"}, {"overwrite": True}):
        with pytest.raises(RunDirError, match="in use by another job") as caught:
            _open(tmp_path, **settings)
        text = str(caught.value)
        assert f"host {socket.gethostname()}, pid {os.getpid()}, Slurm job 4711" in text
        assert str(run.path) in text
        assert len(text.splitlines()) <= 5
    run.close()
    _open(tmp_path, resume="auto").close()


_HOLDER = """
import sys
from fp8train.run_dir.directory import RunDir
run = RunDir.open(sys.argv[1], "exp", resume="auto", overwrite=False, group=None)
print("locked", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_job_is_gone_with_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunDirError, match=f"pid {holder.pid}"):
            _open(tmp_path, resume="auto")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    run = _open(tmp_path, resume="auto")
    assert json.loads((run.path / "run.lock").read_text())["pid"] == os.getpid()
    run.close()


def test_a_linked_lock_file_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("keep me")
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "run.lock").symlink_to(target)
    with pytest.raises(RunDirError, match="cannot be written"):
        _open(tmp_path)
    assert target.read_text() == "keep me"


# ---- records of a resumed run


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("resumed_at", [0, 4, 7, 10])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path, resumed_at: int) -> None:
    whole = _open(tmp_path, "whole")
    for step in range(1, 11):
        whole.log_metrics({"step": step, "loss": 0.1 * step})
    killed = _open(tmp_path, "killed")
    for step in range(1, 9):
        killed.log_metrics({"step": step, "loss": 0.1 * step})
    with (killed.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')  # the line that the kill cut
    killed.close()
    again = _open(tmp_path, "killed", resume="auto")
    again.truncate_after(resumed_at)
    for step in range(min(resumed_at, 8) + 1, 11):
        again.log_metrics({"step": step, "loss": 0.1 * step})
    assert (again.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    assert not [entry for entry in again.path.iterdir() if entry.name.endswith(".tmp")]


def test_truncation_covers_events_and_a_fresh_start(tmp_path: Path) -> None:
    run = _open(tmp_path)
    for step in (0, 1, 2, 3):
        run.log_metrics({"step": step})
        run.log_event("saved", step=step)
    run.truncate_after(1)
    assert _steps(run.path / "metrics.jsonl") == [0, 1]
    assert _steps(run.path / "events.jsonl") == [0, 1]
    run.truncate_after(None)
    assert (run.path / "metrics.jsonl").read_text() == ""
    assert (run.path / "events.jsonl").read_text() == ""
    run.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs: run as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_loses_lines_loudly_and_never_half_of_one(
    tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = _open(tiny_disk)
    for step in range(1, 200):
        run.log_metrics({"step": step, "text": "x" * 3000})
    assert "LOST a line" in caplog.text
    assert "the disk is full" in caplog.text
    steps = _steps(run.path / "metrics.jsonl")  # every line parses
    assert steps == list(range(1, len(steps) + 1))
    assert 10 < len(steps) < 199
    run.close()


# ---- env.json


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JWT", "secret-token")
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    monkeypatch.chdir(tmp_path)
    record = describe_environment(torch.device("cpu"))
    assert record["versions"]["torch"] == torch.__version__
    assert record["host"] == socket.gethostname()
    assert record["variables"]["OMP_NUM_THREADS"] == "1"
    assert record["variables"]["SLURM_JOB_ID"] == "12"
    assert "secret" not in json.dumps(record)
    assert record["git"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run(["git", "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert describe_environment(torch.device("cpu"))["git"] == {"revision": head, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert describe_environment(torch.device("cpu"))["git"] == {"revision": head, "dirty": True}
