"""The list of a checkpoint's files with sizes and SHA-256, written last: its presence means that the rest is
there.

Neither torch, safetensors nor DCP notices a flipped bit in a tensor, so a checkpoint without such a list can
only be hoped to be good. The list also protects itself: it carries the SHA-256 of its own content and must be
byte for byte what we would write, so no flipped bit anywhere in it passes.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8train.checkpoint.errors import CorruptCheckpointError, explain_os_error, shorten
from fp8train.checkpoint.ranks import Ranks
from fp8train.config import places
from fp8train.files import is_real_dir, is_real_file

MANIFEST_FILE = places.MANIFEST_FILE
META_FILE = "meta.json"
METADATA_FILE = ".metadata"
"""DCP's index."""
SHARD_GLOB = "__{rank}_*.distcp"
"""DCP's names of one rank's shard files."""

Verify = Literal["full", "size"]
"""``full``: sizes and SHA-256 of everything; ``size``: sizes, and SHA-256 of the small files only."""

_ALWAYS_HASHED_BYTES = 1 << 20
_READ_BYTES = 1 << 20


class FileEntry(BaseModel):
    """Size and hash of one file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the content."""


class Manifest(BaseModel):
    """What a complete checkpoint consists of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1]
    """Of the directory layout; a change that old readers cannot read raises it."""
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps done when it was saved."""
    world_size: Annotated[int, Field(ge=1)]
    """Ranks that saved it."""
    torch: str
    """Version of PyTorch that wrote it."""
    fp8train: str
    """Version of fp8train that wrote it."""
    files: dict[str, FileEntry]
    """By name; all of them lie in the checkpoint directory itself."""


def encode(manifest: Manifest) -> bytes:
    """Write a manifest in the one byte form that it may have."""
    content = manifest.model_dump()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"content": content, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _ignore(num_bytes: int) -> None:
    """Do nothing."""


def file_entry(path: Path, on_bytes: Callable[[int], None] = _ignore) -> FileEntry:
    """Size and SHA-256 of the file at ``path``; ``on_bytes`` is told how many more bytes were read."""
    digest, buffer, size = hashlib.sha256(), memoryview(bytearray(_READ_BYTES)), 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            on_bytes(count)
    return FileEntry(size=size, sha256=digest.hexdigest())


def read_meta_file(directory: Path) -> tuple[int, dict[str, Any]]:
    """Step and JSON values that the save was given."""
    path = directory / META_FILE
    try:
        content = json.loads(path.read_bytes())
        step, meta = content["step"], content["meta"]
        if not isinstance(step, int) or not isinstance(meta, dict):
            raise TypeError("not an integer step and an object")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: unreadable: {error}") from None
    return step, meta


def read_manifest(directory: Path) -> Manifest:
    """Read a checkpoint's manifest and check it in itself; :class:`CorruptCheckpointError` says what is
    wrong.
    """
    path = directory / MANIFEST_FILE
    if not is_real_dir(directory):
        raise CorruptCheckpointError(f"{directory}: not a directory (symbolic links are refused)")
    if not is_real_file(path):
        raise CorruptCheckpointError(f"{directory}: incomplete checkpoint: {MANIFEST_FILE} is missing")
    data = path.read_bytes()
    try:
        manifest = Manifest.model_validate(json.loads(data)["content"])
    except (ValueError, ValidationError, LookupError, TypeError, RecursionError):
        raise CorruptCheckpointError(f"{path}: damaged: it is not a manifest of this format") from None
    unsafe = [name for name in manifest.files if not _is_plain_name(name)]
    if unsafe:
        raise CorruptCheckpointError(
            f"{path}: refused: it names a file outside the checkpoint: {unsafe[0]!r}"
        )
    if encode(manifest) != data:
        raise CorruptCheckpointError(f"{path}: damaged: its content differs from its own SHA-256")
    return manifest


def _is_plain_name(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).parts == (name,)
        and name[0] != "/"
    )


def verify_checkpoint(
    directory: Path, *, ranks: Ranks, mode: Verify = "full", on_bytes: Callable[[int], None] = _ignore
) -> Manifest:
    """Check a checkpoint against its manifest, hashing different files on different ranks; collective over
    ``ranks``. ``on_bytes`` is told how many more bytes this rank has hashed.

    Raises :class:`CorruptCheckpointError` on every rank, listing missing, foreign, truncated and altered
    files.
    """
    manifest = ranks.first(lambda: _check_listing(directory))
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    mine = [
        name
        for name in names[ranks.rank :: ranks.size]
        if mode == "full" or manifest.files[name].size <= _ALWAYS_HASHED_BYTES
    ]
    problems = ranks.each(
        lambda: [line for name in mine if (line := _check_hash(directory, name, manifest, on_bytes))]
    )
    _refuse(directory, [line for lines in problems for line in lines])
    return manifest


def is_complete(directory: Path) -> bool:
    """Whether a checkpoint's files are all there in the right sizes; nothing large is read."""
    try:
        _check_listing(directory)
    except (CorruptCheckpointError, OSError):
        return False
    return True


def _check_listing(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    present = {entry.name for entry in directory.iterdir()} - {MANIFEST_FILE}
    problems = [f"{name}: missing" for name in sorted(set(manifest.files) - present)]
    problems += [f"{name}: not part of the checkpoint" for name in sorted(present - set(manifest.files))]
    for name in sorted(present & set(manifest.files)):
        path = directory / name
        if not is_real_file(path):
            problems.append(f"{name}: not a regular file")
        elif (size := path.lstat().st_size) != manifest.files[name].size:
            problems.append(f"{name}: {size} bytes, expected {manifest.files[name].size}")
    _refuse(directory, problems)
    return manifest


def _check_hash(directory: Path, name: str, manifest: Manifest, on_bytes: Callable[[int], None]) -> str:
    expected = manifest.files[name]
    try:
        found = file_entry(directory / name, on_bytes)
    except OSError as error:  # a dying disk is damage too: an older checkpoint may still be readable
        return f"{name}: {explain_os_error(error)}"
    if found == expected:
        return ""
    return f"{name}: SHA-256 {found.sha256[:16]}..., expected {expected.sha256[:16]}..."


def _refuse(directory: Path, problems: list[str]) -> None:
    if problems:
        raise CorruptCheckpointError(f"{directory}: damaged checkpoint:\n{shorten(problems)}")
