"""Going back to a checkpoint by path: carried out once, and either given or not given after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.catalog import candidates, find_checkpoint, likely_checkpoint, sweep_leftovers
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.resumed_from import RECORD_FILE, carried_out, read_record
from fp8train.checkpoint.retention import Retention, retain
from fp8train.checkpoint.rollback import complete, roll_back
from fp8train.checkpoint.save import save_checkpoint

STEPS = (10, 20, 30, 40)
RENAMES = 5
"""Of a rollback behind two checkpoints: the record, the two, the pointer, the record again."""


def _save(root: Path, step: int) -> Path:
    tensors = {"x": torch.full((8,), float(step))}
    return save_checkpoint(root, step, tensors, meta={}, rank_state={}, group=None, keep_last=9)


def _step(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "run" / "checkpoints"
    for step in STEPS:
        _save(root, step)
    return root


class Killed(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_a_kill_at_any_moment(root: Path, number: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, count = Path.rename, 0

    def dying(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        result = rename(path, target)
        if count == number:
            raise Killed
        return result

    target = _step(root, 20)
    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(Killed):
        roll_back(root, str(target), target, 20)
    monkeypatch.undo()
    given = number > 1 or after
    expected = target if given else _step(root, 40)
    # whoever only looks, and the next job, whatever it was told
    assert find_checkpoint(root, "auto") == likely_checkpoint(root, "auto") == expected
    sweep_leftovers(root)
    complete(root)
    assert find_checkpoint(root, "auto") == expected
    assert carried_out(root, str(target)) == given
    if given:
        assert (root / "latest").read_text() == "step_00000020\n"
        assert [path.name for path in candidates(root)] == ["step_00000020", "step_00000010"]
        assert sorted(path.name for path in root.glob("*.abandoned")) == [
            "step_00000030.abandoned",
            "step_00000040.abandoned",
        ]
    else:
        assert len(candidates(root)) == 4
    count = RENAMES  # finishing twice changes nothing
    complete(root)
    assert find_checkpoint(root, "auto") == expected


def test_the_same_path_again_continues_from_the_newest(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = _step(root, 20)
    roll_back(root, str(target), target, 20)
    assert "WENT BACK to" in caplog.text
    newer = _save(root, 30)
    assert find_checkpoint(root, str(target)) == likely_checkpoint(root, str(target)) == newer
    shutil.rmtree(target)  # retention may take it
    assert find_checkpoint(root, str(target)) == newer
    roll_back(root, str(target), newer, 30)
    assert newer.is_dir()
    retain(root, Retention(1), newest=30)
    assert len(list(root.glob("*.abandoned"))) == 2


def test_another_path_or_a_deleted_record_goes_back_again(root: Path) -> None:
    target = _step(root, 20)
    roll_back(root, str(target), target, 20)
    _save(root, 30)
    roll_back(root, str(_step(root, 10)), _step(root, 10), 10)
    assert [path.name for path in candidates(root)] == ["step_00000010"]
    assert sorted(path.name for path in root.glob("*.abandoned*")) == [
        "step_00000020.abandoned",
        "step_00000030.abandoned",
        "step_00000030.abandoned-2",
        "step_00000040.abandoned",
    ]
    _save(root, 20)
    (root / RECORD_FILE).unlink()
    roll_back(root, str(_step(root, 10)), _step(root, 10), 10)
    assert find_checkpoint(root, "auto") == _step(root, 10)
    with pytest.raises(CheckpointError, match="rename it to step_00000040"):
        find_checkpoint(root, str(root / "step_00000040.abandoned"))


def test_a_moved_run_knows_its_order(root: Path, tmp_path: Path) -> None:
    roll_back(root, str(_step(root, 20)), _step(root, 20), 20)
    moved = root.parent.rename(tmp_path / "elsewhere") / "checkpoints"
    assert carried_out(moved, str(_step(moved, 20)))


def test_a_run_that_began_at_another_ones_checkpoint(root: Path, tmp_path: Path) -> None:
    """Killed before its first save it begins there again, and nowhere else."""
    own = tmp_path / "new" / "checkpoints"
    own.mkdir(parents=True)
    source = _step(root, 20)
    roll_back(own, str(source), source, 20)
    assert len(list(root.glob("step_*"))) == 4
    for resume in ("auto", str(source)):
        assert find_checkpoint(own, resume) == likely_checkpoint(own, resume) == source
    newer = _save(own, 30)
    for resume in ("auto", str(source)):
        assert find_checkpoint(own, resume) == newer


def test_its_own_directory_is_no_order(root: Path) -> None:
    roll_back(root, str(root.parent), _step(root, 40), 40)
    assert read_record(root) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 5000, b'{"asked": 1}'])
def test_a_garbled_record_is_one_error(root: Path, content: bytes) -> None:
    (root / RECORD_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"resumed_from\.json: damaged: .* Delete it") as caught:
        find_checkpoint(root, "auto")
    assert len(str(caught.value).splitlines()) == 1
