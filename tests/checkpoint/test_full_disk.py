"""A disk that is full at every single write of a save, one after the other, and one without inodes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fp8train.checkpoint.catalog import delete_checkpoint, find_checkpoint, sweep_leftovers
from fp8train.checkpoint.errors import CheckpointError
from fp8train.files import remove
from tests.checkpoint.test_faults import _assert_failed_cleanly, _assert_resumable, _save


class FullAt:
    """The k-th call that makes, names or syncs something finds no room; so do those after it, until freed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = self.calls = 0
        for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (os, "rename")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.at and self.calls >= self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return call


def test_a_disk_that_is_full_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    _save(root, 1), _save(root, 2)
    disk, failures, newest = FullAt(monkeypatch), 0, set()
    for at in range(1, 100):
        disk.at, disk.calls = at, 0
        error = ""
        try:
            _save(root, 3)
        except CheckpointError as problem:
            error = str(problem)
        reached, disk.at = disk.calls >= at, 0
        if not reached:
            break
        assert "the disk is full; free some space" in error or not error, error  # deletions only warn
        assert len(error.splitlines()) <= 1
        failures += bool(error)
        newest.add(_assert_resumable(root, {2, 3}))
        sweep_leftovers(root)
        remove(root / "step_00000003")
        for step in (1, 2):
            _save(root, step)
    assert failures >= 8
    assert newest == {2, 3}
    assert not list(root.glob("*.tmp"))


def test_a_disk_without_inodes(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=16", "tmpfs", str(mount)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs: run as root")
    except FileNotFoundError:
        pytest.skip("needs the program mount: apt-get install mount")
    try:
        root = mount / "checkpoints"
        _save(root, 1), _save(root, 2)
        with pytest.raises(CheckpointError, match="the disk is full; free some space"):
            _save(root, 3)
        _assert_failed_cleanly(root)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_what_nfs_keeps_of_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that cannot remove ``.nfs*`` leaves it and its directory, and nothing else; saving goes on."""
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        _save(root, step)
    held = root / "step_00000001" / ".nfs0000000100000002"
    held.write_bytes(b"open elsewhere")
    unlink = os.unlink

    def busy(path: Any, *args: Any, **kwargs: Any) -> None:
        if os.fspath(path).endswith(held.name):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", busy)
    delete_checkpoint(root / "step_00000001")
    left = root / "step_00000001.tmp"
    assert [path.name for path in left.iterdir()] == [held.name]
    sweep_leftovers(root)
    _save(root, 1)  # under the name whose leftovers stay
    assert (root / "step_00000001" / held.name).exists()
    assert find_checkpoint(root, str(root / "step_00000001")) == root / "step_00000001"
