"""Which checkpoint a run continues from, and which ones are deleted."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.catalog import candidates, find_checkpoint, sweep_leftovers
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.retention import Retention, retain
from fp8train.checkpoint.save import save_checkpoint
from tests.checkpoint.loading import load_checkpoint


def _save(root: Path, step: int, keep_last: int = 9) -> Path:
    return save_checkpoint(
        root,
        step,
        {"x": torch.full((8,), float(step))},
        meta={},
        rank_state={},
        group=None,
        keep_last=keep_last,
    )


def _content(path: Path) -> float:
    x = torch.zeros(8)
    load_checkpoint(path, {"x": x}, group=None)
    assert torch.all(x == x[0])
    return x[0].item()


def _damage(path: Path) -> None:
    shard = path / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        _save(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run" / "checkpoints"


def test_auto_takes_the_newest_and_never_takes_none(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_checkpoint(root, "auto") == root / "step_00000030"
    assert find_checkpoint(root, "never") is None
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_auto_starts_fresh_where_nothing_is(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    assert find_checkpoint(tmp_path, "auto") is None


@pytest.mark.parametrize(
    "pointer",
    [b"", b"garbage", b"step_00000099\n", b"../../etc\n", b"\xff\x00\xfe", b"step_1", b"x" * 10_000],
)
def test_a_broken_pointer_falls_back_with_a_warning(
    root: Path, pointer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "latest").write_bytes(pointer)
    assert find_checkpoint(root, "auto") == root / "step_00000030"
    assert "latest is unusable" in caplog.text
    assert "step_00000030" in caplog.text


def test_a_missing_or_linked_pointer_falls_back_with_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "latest").unlink()
    assert find_checkpoint(root, "auto") == root / "step_00000030"
    assert "latest is missing" in caplog.text
    (root / "other").write_text("step_00000010")
    (root / "latest").symlink_to(root / "other")
    assert find_checkpoint(root, "auto") == root / "step_00000030"


def test_the_pointer_decides_over_the_number(root: Path) -> None:
    (root / "latest").write_text("step_00000020\n")
    assert [path.name for path in candidates(root)] == ["step_00000020", "step_00000010", "step_00000030"]
    assert find_checkpoint(root, "auto") == root / "step_00000020"


def test_auto_passes_over_damaged_checkpoints_loudly(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    _damage(root / "step_00000030")
    (root / "step_00000020" / "manifest.json").unlink()
    assert find_checkpoint(root, "auto") == root / "step_00000010"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "step_00000030" in warnings[0]
    assert "SHA-256" in warnings[0]
    assert "step_00000020" in warnings[1]
    assert "manifest.json is missing" in warnings[1]


def test_auto_does_not_start_afresh_over_damaged_checkpoints(root: Path) -> None:
    for path in candidates(root):
        _damage(path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable") as caught:
        find_checkpoint(root, "auto")
    assert len(str(caught.value).splitlines()) <= 5
    assert str(caught.value).endswith("\nrestore one from a copy")  # a run adds how to start afresh


def test_explicit_paths(root: Path) -> None:
    assert find_checkpoint(root, str(root / "step_00000020")) == root / "step_00000020"
    assert find_checkpoint(Path("ignored"), str(root)) == root / "step_00000030"
    assert find_checkpoint(Path("ignored"), str(root.parent)) == root / "step_00000030"


def test_an_explicit_path_without_checkpoint_is_an_error(root: Path, tmp_path: Path) -> None:
    for path, reason in (
        (root / "step_00000099", "does not exist"),
        (tmp_path / "typo", "does not exist"),
        (tmp_path, "holds no checkpoint"),
        (root / "latest", "holds no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            find_checkpoint(root, str(path))
        assert str(path) in str(caught.value)
        assert "`resume`=auto" in str(caught.value)


def test_an_explicit_damaged_checkpoint_is_an_error_not_a_fallback(root: Path) -> None:
    _damage(root / "step_00000030")
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(root, str(root / "step_00000030"))


def test_unfinished_and_linked_checkpoints_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "step_00000010", root / "step_00000040.tmp")
    link = root / "step_00000050"
    link.symlink_to(root / "step_00000010")
    assert [path.name for path in candidates(root)] == ["step_00000030", "step_00000020", "step_00000010"]
    for path, reason in ((root / "step_00000040.tmp", "unfinished save"), (link, "symbolic link")):
        with pytest.raises(CheckpointError, match=reason):
            find_checkpoint(root, str(path))
    with pytest.raises(CheckpointError, match="symbolic link"):
        _save(root, 50)
    assert link.is_symlink()
    assert _content(root / "step_00000010") == 10


def test_retention_keeps_the_last_k(tmp_path: Path) -> None:
    for step in range(1, 7):
        _save(tmp_path, step, keep_last=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000005",
        "step_00000006",
    ]


def test_retention_spares_pointer_target_links_incomplete_and_later_ones(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(root / "step_00000010", outside)
    (root / "step_00000001").symlink_to(outside)
    shutil.copytree(root / "step_00000010", root / "step_00000002")
    (root / "step_00000002" / "manifest.json").unlink()
    _save(root, 40)
    (root / "latest").write_text("step_00000010\n")
    deleted = retain(root, Retention(1), newest=30)
    assert [path.name for path in deleted] == ["step_00000020"]
    left = {path.name for path in root.iterdir()}
    assert left == {
        "latest",
        "step_00000001",
        "step_00000002",
        "step_00000010",
        "step_00000030",
        "step_00000040",
    }
    assert len(list(outside.iterdir())) == 4


def test_deleting_does_not_follow_a_link_inside_a_checkpoint(root: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("keep me")
    (root / "step_00000010" / "link").symlink_to(precious)
    _save(root, 40, keep_last=1)
    assert not (root / "step_00000010").exists()
    assert (precious / "data").read_text() == "keep me"


def test_a_failed_deletion_only_warns(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("fp8train.checkpoint.retention.delete_checkpoint", stuck)
    assert _save(root, 40, keep_last=1).is_dir()
    assert caplog.text.count("could not delete the old checkpoint") == 3
    assert find_checkpoint(root, "auto") == root / "step_00000040"


def test_saving_a_step_again_replaces_it(root: Path) -> None:
    path = save_checkpoint(
        root, 30, {"x": torch.full((8,), 31.0)}, meta={}, rank_state={}, group=None, keep_last=9
    )
    assert _content(path) == 31
    assert {entry.name for entry in root.iterdir()} == {
        "latest",
        "step_00000010",
        "step_00000020",
        "step_00000030",
    }


def test_leftovers_are_swept_and_nothing_else(root: Path, tmp_path: Path) -> None:
    (root / "step_00000040.tmp").mkdir()
    (root / "step_00000040.tmp" / "__0_0.distcp").write_bytes(b"partial")
    (root / ".latest.123.tmp").write_text("x")
    (root / "notes.tmp").write_text("a user's")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("keep me")
    (root / "step_00000050.tmp").symlink_to(outside)
    assert sweep_leftovers(root) == [".latest.123.tmp", "step_00000040.tmp", "step_00000050.tmp"]
    assert (root / "notes.tmp").exists()
    assert (outside / "data").read_text() == "keep me"
    assert len(candidates(root)) == 3
    assert sweep_leftovers(tmp_path / "absent") == []


def test_an_unfinished_replacement_is_undone(root: Path) -> None:
    (root / "step_00000030").rename(root / "step_00000030.replaced")
    found = find_checkpoint(root, "auto")
    assert found is not None
    assert _content(found) == 30
    sweep_leftovers(root)
    assert find_checkpoint(root, "auto") == root / "step_00000030"
    assert _content(root / "step_00000030") == 30


def test_steps_beyond_eight_digits(tmp_path: Path) -> None:
    _save(tmp_path, 99_999_999)
    path = _save(tmp_path, 100_000_000)
    assert path.name == "step_100000000"
    assert find_checkpoint(tmp_path, "auto") == path
