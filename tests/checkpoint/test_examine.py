"""``fp8train verify``: damage of every kind gives exit status 2 and one line that names it, no traceback."""

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.manifest import encode, file_entry, read_manifest
from fp8train.checkpoint.save import save_checkpoint
from fp8train.cli import run_command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (3, 6):
        save_checkpoint(
            tmp_path / "run" / "checkpoints",
            step,
            {"w": torch.arange(300.0) + step, "scale": torch.ones(4)},
            meta={"lr": 0.1},
            rank_state={"seed": torch.tensor(step)},
            group=None,
            keep_last=2,
        )
    return tmp_path / "run"


def verify(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit status and lines of the output."""
    capsys.readouterr()
    status = run_command(["verify", str(path)])
    return status, capsys.readouterr().out.splitlines()


def test_one_line_for_each_good_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = verify(run, capsys)
    assert status == 0
    assert len(lines) == 2
    newest = run / "checkpoints" / "step_00000006"
    size = sum(file.stat().st_size for file in newest.iterdir())
    assert lines[1].startswith(f"{newest}: step 6, 4 files, {size:,} bytes, 0.")
    assert all(line.endswith(" s: ok") for line in lines)
    assert verify(run / "checkpoints", capsys)[1] and verify(newest, capsys) == (0, [lines[1]])
    (run / "checkpoints" / "step_00000009.tmp").mkdir()
    status, lines = verify(run, capsys)
    assert status == 0
    assert "unfinished save" in lines[2]


def test_fifty_random_bits_over_all_files_are_all_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    path = run / "checkpoints" / "step_00000006"
    files = sorted(path.iterdir())
    sizes = [file.stat().st_size for file in files]
    for _ in range(50):
        file = generator.choices(files, sizes)[0]
        original = file.read_bytes()
        position, bit = generator.randrange(len(original)), generator.randrange(8)
        damaged = bytearray(original)
        damaged[position] ^= 1 << bit
        file.write_bytes(bytes(damaged))
        status, lines = verify(run, capsys)
        assert status == 2, (seed, file.name, position, bit)
        assert lines[0].endswith(": ok")
        assert file.name in lines[1] and not lines[1].endswith(": ok"), lines
        file.write_bytes(original)
    assert verify(run, capsys)[0] == 0


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _resign(path: Path, **extra: object) -> None:
    manifest = read_manifest(path)
    files = {name: file_entry(path / name) for name in manifest.files} | extra
    (path / "manifest.json").write_bytes(encode(manifest.model_copy(update={"files": files})))


def _malicious_index(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(_Attack(path / "executed")))
    _resign(path)


def _description_of_another_step(path: Path) -> None:
    (path / "meta.json").write_text('{"step": 4, "meta": {}}')
    _resign(path)


def _half_a_shard(path: Path) -> None:
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:700])
    _resign(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path / "__0_0.distcp", 10), "__0_0.distcp: 10 bytes, expected"),
    "missing shard": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
    "missing index": (lambda path: (path / ".metadata").unlink(), ".metadata: missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "foreign shard": (lambda path: (path / "__7_0.distcp").touch(), "__7_0.distcp: not part of the"),
    "empty": (lambda path: (shutil.rmtree(path), path.mkdir()), "incomplete checkpoint"),
    "a file": (lambda path: (shutil.rmtree(path), path.touch()), "not a directory"),
    "a link": (
        lambda path: (path.rename(path.with_name("other")), path.symlink_to(path.with_name("other"))),
        "symbolic links are refused",
    ),
    "path traversal": (
        lambda path: _resign(path, **{"../latest": file_entry(path.parent / "latest")}),
        "refused: it names a file outside the checkpoint: '../latest'",
    ),
    "malicious pickle": (_malicious_index, "refused: not a checkpoint index (it asks for posix.system)"),
    "another step": (_description_of_another_step, "is the checkpoint of step 6, not of its name"),
    "half a shard, signed": (_half_a_shard, "ends after __0_0.distcp"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(run: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step_00000006"
    act, words = DAMAGE[damage]
    act(path)
    status, lines = verify(run, capsys)
    assert status == 2
    assert lines[0].endswith(": ok")
    assert lines[1].startswith(f"{path}: step 6, ")
    assert words in lines[1]
    assert not list(run.rglob("executed"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"step_00000099\n", b"../../etc\n", b"\xff\x00"])
def test_a_pointer_that_names_nothing(run: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "latest").write_bytes(content)
    status, lines = verify(run, capsys)
    assert status == 2
    assert lines[-1].startswith(f"{run / 'checkpoints' / 'latest'}: missing or names no checkpoint")
    assert [line.endswith(": ok") for line in lines] == [True, True, False]


@pytest.mark.parametrize("name", ["absent", "absent/step_00000001", "file", "."])
def test_what_is_no_checkpoint(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run_command(["verify", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error
    assert len(error.splitlines()) == 1


def test_progress_of_large_checkpoints(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8train.checkpoint.examine._LARGE_BYTES", 0)
    monkeypatch.setattr("fp8train.data.byte_progress._SECONDS_BETWEEN_LINES", 0.0)
    assert run_command(["verify", str(run)]) == 0
    captured = capsys.readouterr()
    assert "step_00000006: 100% of 0.0 MB" in captured.err
    assert len(captured.out.splitlines()) == 2
