"""Damaged, foreign and hostile checkpoints: always refused, always named, nothing executed."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from fp8train.checkpoint.catalog import find_checkpoint, likely_checkpoint
from fp8train.checkpoint.errors import CorruptCheckpointError, OtherFormatError
from fp8train.checkpoint.manifest import encode, file_entry, read_manifest, verify_checkpoint
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.retention import Retention, retain
from fp8train.checkpoint.save import save_checkpoint
from tests.checkpoint.loading import load_checkpoint

ALONE = Ranks(None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return _save(tmp_path / "checkpoints", 3)


def _save(root: Path, step: int) -> Path:
    return save_checkpoint(
        root,
        step,
        {"w": torch.arange(300.0), "scale": torch.ones(4)},
        meta={"lr": 0.1},
        rank_state={},
        group=None,
        keep_last=2,
    )


def _load(path: Path) -> None:
    load_checkpoint(path, {"w": torch.zeros(300), "scale": torch.zeros(4)}, group=None)


def _resign(path: Path, **changes: object) -> None:
    """What an attacker does: make the manifest match the altered files."""
    old = read_manifest(path)
    files = {name: file_entry(path / name) for name in old.files}
    (path / "manifest.json").write_bytes(encode(old.model_copy(update={"files": files, **changes})))


def test_flipped_bits_anywhere_are_found(path: Path) -> None:
    rng = random.Random(20)
    files = sorted(path.iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "manifest.json", "meta.json"]
    missed, unnamed = [], 0
    for file in files:
        original = file.read_bytes()
        for _ in range(50):
            position, bit = rng.randrange(len(original)), rng.randrange(8)
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            file.write_bytes(bytes(damaged))
            try:
                verify_checkpoint(path, ranks=ALONE)
            except CorruptCheckpointError as error:
                unnamed += file.name not in str(error)
            else:
                missed.append((file.name, position, bit))
        file.write_bytes(original)
    assert missed == []
    assert unnamed == 0
    _load(path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json", "meta.json"])
@pytest.mark.parametrize("keep", [0, 1, -1])
def test_truncation_is_found_with_sizes(path: Path, name: str, keep: int) -> None:
    file = path / name
    size = file.stat().st_size
    left = keep if keep >= 0 else size - 1
    os.truncate(file, left)
    for mode in ("full", "size"):
        with pytest.raises(CorruptCheckpointError) as caught:
            verify_checkpoint(path, ranks=ALONE, mode=mode)
        assert name in str(caught.value)
        if name != "manifest.json":
            assert f"{left} bytes, expected {size}" in str(caught.value)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json", "meta.json"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(CorruptCheckpointError, match="missing") as caught:
        _load(path)
    assert name in str(caught.value)


def test_a_foreign_file_is_named(path: Path) -> None:
    (path / "__1_0.distcp").write_bytes(b"x")
    with pytest.raises(CorruptCheckpointError, match=r"__1_0\.distcp: not part of the checkpoint"):
        _load(path)


def test_linked_files_and_directories_are_refused(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "step_00000003"
    link.symlink_to(path)
    with pytest.raises(CorruptCheckpointError, match="symbolic links are refused"):
        _load(link)
    shard = path / "__0_0.distcp"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpointError, match="not a regular file"):
        _load(path)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(path: Path) -> None:
    moved = path.rename(path.with_name("step_00000009"))
    with pytest.raises(CorruptCheckpointError, match="is the checkpoint of step 3"):
        _load(moved)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "./x", "x/"])
def test_manifest_paths_outside_the_checkpoint_are_refused(path: Path, name: str) -> None:
    manifest = read_manifest(path)
    files = {**manifest.files, name: next(iter(manifest.files.values()))}
    (path / "manifest.json").write_bytes(encode(manifest.model_copy(update={"files": files})))
    with pytest.raises(CorruptCheckpointError, match="outside the checkpoint"):
        _load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b'{"content": 3}', b"\xff\xfe", b"[" * 100_000, b'{"content": {"files": 1}}'],
)
def test_garbage_manifests_are_refused(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        _load(path)


def test_what_a_file_system_or_editor_leaves_is_told_and_not_read(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (".nfs0000a1", ".DS_Store", "meta.json~"):
        (path / name).write_bytes(b"x")
    (path / "lost+found").mkdir()
    _load(path)
    assert find_checkpoint(path.parent, "auto") == path
    for name in (".nfs0000a1", ".DS_Store", "meta.json~", "lost+found"):
        assert f"{path / name} is not part of the checkpoint" in caplog.text


OTHER_FORMATS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "newer": lambda content: content | {"format_version": 2, "fp8train": "9.8", "shards": {}},
    "a key more": lambda content: content | {"compression": "zstd", "fp8train": "9.8"},
    "older": lambda content: content | {"format_version": 0, "fp8train": "0.0.1"},
}


@pytest.mark.parametrize("kind", [*OTHER_FORMATS, "another envelope"])
def test_another_format_is_no_damage(path: Path, kind: str) -> None:
    """It is refused by name, also by auto, and neither replaced nor deleted."""
    root, manifest = path.parent, path / "manifest.json"
    if kind == "another envelope":
        manifest.write_text('{"format_version": 3, "fp8train": "9.8", "parts": []}')
    else:
        content = OTHER_FORMATS[kind](json.loads(manifest.read_bytes())["content"])
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps({"content": content, "sha256": digest}))
    before = manifest.read_bytes()
    shutil.copytree(path, root / "step_00000001")
    words = r"made by an older fp8train \(0.0.1\)" if kind == "older" else r"made by a newer fp8train \(9.8\)"
    for look in (find_checkpoint, likely_checkpoint):
        for resume in ("auto", str(path)):
            if look is likely_checkpoint and resume != "auto":
                continue
            with pytest.raises(OtherFormatError, match=words):
                look(root, resume)
    with pytest.raises(OtherFormatError, match=words):
        _save(root, 3)
    assert not list(root.glob("*.tmp"))
    for step in (4, 5, 6):
        _save(root, step)
    retain(root, Retention(1), newest=6)
    assert manifest.read_bytes() == before
    assert (root / "step_00000001").is_dir()
    (root / "latest").write_text("step_00000006\n")
    shutil.copytree(path, root / "step_00000009")
    with pytest.raises(OtherFormatError, match=words):
        find_checkpoint(root, "auto")  # it would be replaced when the run comes there


class _Attack:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def _touch(marker: Path) -> dict[str, bytes]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": pickle.dumps(_Attack(os.system, f"touch {marker}")),
        "eval": pickle.dumps(_Attack(eval, code)),
        "nested in a list": pickle.dumps([1, {"a": _Attack(exec, code)}]),
        "getattr chain": pickle.dumps(_Attack(getattr, _Attack(__import__, "os"), "getpid")),
        "getattr of a record": b"cbuiltins\ngetattr\n(ctorch\nSize\nV__subclasses__\ntR(tR.",
        "torch function": pickle.dumps(_Attack(torch.load, str(marker))),
        "not a pickle": b"hello",
        "empty": b"",
        "another object": pickle.dumps({"state_dict_metadata": {}}),
        "tampered class": (
            b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}Vfqn\nctorch\nSize\ns\x86b."
        ),
    }


@pytest.mark.parametrize("attack", sorted(_touch(Path("x"))))
def test_a_malicious_index_is_refused_and_not_executed(path: Path, tmp_path: Path, attack: str) -> None:
    marker = tmp_path / "executed"
    before = dict(vars(MetadataIndex))
    (path / ".metadata").write_bytes(_touch(marker)[attack])
    _resign(path)
    with pytest.raises(CorruptCheckpointError, match="not a checkpoint index"):
        _load(path)
    assert not marker.exists()
    assert dict(vars(MetadataIndex)) == before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("attack", ["os.system", "eval"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_shard_is_refused_and_not_executed(
    path: Path, tmp_path: Path, attack: str, archive: bool
) -> None:
    marker = tmp_path / "executed"
    shard = path / "__0_0.distcp"
    if archive:
        calls = {
            "os.system": _Attack(os.system, f"touch {marker}"),
            "eval": _Attack(eval, f"open({str(marker)!r}, 'w')"),
        }
        torch.save(calls[attack], shard)
    else:
        shard.write_bytes(_touch(marker)[attack])
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, shard.stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    _resign(path)
    with pytest.raises(CorruptCheckpointError, match="cannot read the shards"):
        _load(path)
    assert not marker.exists()


@pytest.mark.parametrize("target", ["../secret.distcp", "/etc/passwd", "other.distcp"])
def test_an_index_that_points_elsewhere_is_refused(path: Path, target: str) -> None:
    shutil.copy(path / "__0_0.distcp", path.parent / "secret.distcp")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = target
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    _resign(path)
    with pytest.raises(CorruptCheckpointError, match="it points at"):
        _load(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_still_reads_our_checkpoints(path: Path) -> None:
    target = {"w": torch.zeros(300), "scale": torch.zeros(4)}
    torch.distributed.checkpoint.load(target, checkpoint_id=path, no_dist=True)
    assert torch.equal(target["w"], torch.arange(300.0))
    assert target["scale"].tolist() == [1, 1, 1, 1]


def test_size_mode_still_hashes_small_files(path: Path) -> None:
    content = json.loads((path / "meta.json").read_bytes())
    content["meta"]["lr"] = 0.2
    (path / "meta.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(CorruptCheckpointError, match=r"meta\.json: SHA-256"):
        verify_checkpoint(path, ranks=ALONE, mode="size")
