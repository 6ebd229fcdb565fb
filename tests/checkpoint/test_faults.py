"""Kills and full disks at every moment of a save: the previous checkpoint or the new one is there, whole."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint import catalog
from fp8train.checkpoint.catalog import find_checkpoint, sweep_leftovers
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.save import save_checkpoint
from tests.checkpoint.loading import load_checkpoint

NUM_TENSORS = 6


def _tensors(step: int, size: int = 64) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((size,), step + i / 8) for i in range(NUM_TENSORS)}


def _save(
    root: Path, step: int, on_phase: Callable[[str], None] = lambda phase: None, size: int = 64
) -> None:
    save_checkpoint(
        root, step, _tensors(step, size), meta={}, rank_state={}, group=None, keep_last=2, on_phase=on_phase
    )


def _assert_resumable(root: Path, allowed: set[int]) -> int:
    """The next job's view: something allowed is found, loads bit for bit, and saving goes on."""
    found = find_checkpoint(root, "auto")
    assert found is not None
    sweep_leftovers(root)
    found = find_checkpoint(root, "auto")
    assert found is not None
    loaded = _tensors(0)
    step = load_checkpoint(found, loaded, group=None).step
    assert step in allowed
    assert all(torch.equal(loaded[key], value) for key, value in _tensors(step).items())
    assert not [
        entry.name for entry in root.iterdir() if not catalog.step_of(entry) and entry.name != "latest"
    ]
    return step


def _in_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads of the parent are not in the child: it would wait
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def _kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "checkpoints"
    _save(root, 1), _save(root, 2)
    return root


MOMENTS = [
    ("begin", 1, 2),
    *(("data", count, 2) for count in range(1, NUM_TENSORS + 1)),
    ("manifest", 1, 2),
    ("rename", 1, 2),
    ("pointer", 1, 2),
    ("retention", 1, 3),
]


@pytest.mark.parametrize(("phase", "count", "expected"), MOMENTS)
def test_kill_at_every_phase(root: Path, phase: str, count: int, expected: int) -> None:
    seen = 0

    def hook(now: str) -> None:
        nonlocal seen
        seen += now == phase
        if seen == count:
            _kill_self()

    status = _in_child(lambda: _save(root, 3, hook))
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert _assert_resumable(root, {expected}) == expected
    _save(root, 3)
    assert _assert_resumable(root, {3}) == 3
    assert len(list(root.glob("step_*"))) == 2


@pytest.mark.parametrize("phase", ["rename", "pointer", "retention"])
def test_kill_while_a_step_is_saved_again(root: Path, phase: str) -> None:
    status = _in_child(lambda: _save(root, 2, lambda now: _kill_self() if now == phase else None))
    assert os.WIFSIGNALED(status)
    _assert_resumable(root, {2})


def test_kill_between_the_renames_of_a_replacement(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def rename_then_die(path: Path, target: Path) -> None:
        rename(path, target)
        if target.name.endswith(".replaced"):
            _kill_self()

    monkeypatch.setattr(Path, "rename", rename_then_die)
    status = _in_child(lambda: _save(root, 2))
    monkeypatch.undo()
    assert os.WIFSIGNALED(status)
    _assert_resumable(root, {2})


def test_kill_in_the_middle_of_a_retention_delete(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_one_file_then_die(path: Path) -> None:
        if path.is_dir():
            next(iter(path.iterdir())).unlink()
            _kill_self()

    monkeypatch.setattr(catalog, "remove", remove_one_file_then_die)
    status = _in_child(lambda: _save(root, 3))
    monkeypatch.undo()
    assert os.WIFSIGNALED(status)
    assert (root / "step_00000001.tmp").is_dir()
    assert not (root / "step_00000001").exists()
    assert _assert_resumable(root, {3}) == 3


def test_kill_at_random_moments(root: Path) -> None:
    rng = random.Random(7)
    step = 2
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            for later in range(step + 1, step + 1000):
                _save(root, later)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.2))  # only chooses the moment; nothing is asserted about it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = _assert_resumable(root, set(range(step, step + 1000)))
    assert step > 2


def _assert_failed_cleanly(root: Path) -> None:
    assert sorted(entry.name for entry in root.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    assert (root / "latest").read_text() == "step_00000002\n"
    assert _assert_resumable(root, {2}) == 2


def test_file_size_limit_is_reported_and_cleaned_up(root: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"

    def save_limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            _save(root, 3, size=100_000)
        except CheckpointError as error:
            report.write_text(str(error))

    assert _in_child(save_limited) == 0
    assert "step_00000003.tmp" in report.read_text()
    assert "size limit" in report.read_text()
    assert len(report.read_text().splitlines()) == 1
    _assert_failed_cleanly(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs: run as root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_too_small_is_refused_before_writing(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    _save(root, 1), _save(root, 2)
    phases: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        _save(root, 3, phases.append, size=300_000)
    assert "no room for the checkpoint of step 3: it needs 6.9 MiB" in str(caught.value)
    assert "`keep_last`" in str(caught.value)
    assert phases == ["begin"]
    _assert_failed_cleanly(root)


@pytest.mark.parametrize("phase", ["data", "manifest", "pointer"])
def test_a_disk_that_fills_up_during_the_save(small_disk: Path, phase: str) -> None:
    root = small_disk / "checkpoints"
    _save(root, 1), _save(root, 2)
    filler = small_disk / "filler"

    def fill(now: str) -> None:
        if now == phase and not filler.exists():
            done = subprocess.run(
                ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True, text=True
            )
            assert "No space left" in done.stderr

    with pytest.raises(CheckpointError, match="the disk is full; free some space") as caught:
        _save(root, 3, fill, size=20_000)
    assert str(root) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    filler.unlink()
    if phase == "pointer":  # the new checkpoint was already whole; it is kept, the pointer is as before
        assert (root / "latest").read_text() == "step_00000002\n"
        shutil.rmtree(root / "step_00000003")
    _assert_failed_cleanly(root)


def test_saving_into_something_that_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        _save(tmp_path / "file" / "checkpoints", 1)
