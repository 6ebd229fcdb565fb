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
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8train import __version__
from fp8train.checkpoint.errors import CorruptCheckpointError, OtherFormatError, explain_os_error, shorten
from fp8train.checkpoint.ranks import Ranks
from fp8train.config import places
from fp8train.files import is_real_dir, is_real_file

MANIFEST_FILE = places.MANIFEST_FILE
META_FILE = "meta.json"
METADATA_FILE = ".metadata"
"""DCP's index."""
SHARD_GLOB = "__{rank}_*.distcp"
"""DCP's names of one rank's shard files."""

FORMAT_VERSION: Final = 1
"""Of the checkpoints that this program writes and reads."""

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

    format_version: Literal[1]  # FORMAT_VERSION
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


def read_manifest(directory: Path) -> Manifest:
    """Read a checkpoint's manifest and check it in itself.

    Raises:
        OtherFormatError: it is whole, but of a format that this program does not read.
        CorruptCheckpointError: says what is wrong otherwise.
    """
    path = directory / MANIFEST_FILE
    if not is_real_dir(directory):
        raise CorruptCheckpointError(f"{directory}: not a directory (symbolic links are refused)")
    if not is_real_file(path):
        raise CorruptCheckpointError(f"{directory}: incomplete checkpoint: {MANIFEST_FILE} is missing")
    try:
        data = path.read_bytes()
        content, whole = _content(json.loads(data))
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: unreadable: {explain_os_error(error)}") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise CorruptCheckpointError(f"{path}: damaged: it is not a manifest of this format") from None
    if whole:
        _check_format(directory, content)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise CorruptCheckpointError(
            f"{path}: damaged: it is not a manifest of this format: {first_problem(error)}"
        ) from None
    unsafe = [name for name in manifest.files if not _is_plain_name(name)]
    if unsafe:
        raise CorruptCheckpointError(
            f"{path}: refused: it names a file outside the checkpoint: {unsafe[0]!r}"
        )
    if not whole or encode(manifest) != data:
        raise CorruptCheckpointError(f"{path}: damaged: its content differs from its own SHA-256")
    lacking = {META_FILE, METADATA_FILE} - manifest.files.keys()
    if lacking:
        raise CorruptCheckpointError(f"{path}: damaged: files: {min(lacking)} is not among them")
    return manifest


def _content(envelope: Any) -> tuple[dict[str, Any], bool]:
    """What the manifest says, and whether it is what was written. Another format may have another envelope,
    but says its number in it."""
    if not isinstance(envelope, dict):
        raise TypeError("not an object")
    if "content" not in envelope and isinstance(envelope.get("format_version"), int):
        return envelope, True
    content = envelope["content"]
    if not isinstance(content, dict):
        raise TypeError("not an object")
    return content, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == envelope[
        "sha256"
    ]


def _check_format(directory: Path, content: dict[str, Any]) -> None:
    """Refuse a manifest that is no damage, but not for this program either."""
    version, unknown = content.get("format_version"), sorted(content.keys() - Manifest.model_fields.keys())
    if type(version) is not int or (version == FORMAT_VERSION and not unknown):
        return
    author = content.get("fp8train")
    by = f" ({author})" if isinstance(author, str) and author.isprintable() and len(author) < 40 else ""
    if version < FORMAT_VERSION:
        raise OtherFormatError(
            f"{directory}: made by an older fp8train{by}: it has format {version}, this one ({__version__}) "
            f"reads {FORMAT_VERSION}; read it with that version"
        )
    what = f"format {version}" if version > FORMAT_VERSION else f"the key {unknown[0]!a} in its manifest"
    raise OtherFormatError(
        f"{directory}: made by a newer fp8train{by}: it has {what}, this one ({__version__}) reads format "
        f"{FORMAT_VERSION}; nothing was changed. Install that version, or continue an older checkpoint: "
        "`resume`=PATH"
    )


def first_problem(error: ValidationError) -> str:
    """``key: what is wrong`` of the first thing that does not fit, on one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(ascii(part)[1:-1] if isinstance(part, str) else str(part) for part in first["loc"])
    text = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{key}: {text}" if key else text


def _is_plain_name(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and name.isprintable()
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
    """Whether a checkpoint's files are all there in the right sizes; nothing large is read.

    Raises:
        OtherFormatError: this program cannot tell.
    """
    try:
        _check_listing(directory)
    except (CorruptCheckpointError, OSError):
        return False
    return True


def strays(directory: Path, manifest: Manifest) -> list[str]:
    """Names in a checkpoint that do not belong to it: what a file system, a file browser or an editor left
    there. Nothing reads them."""
    return sorted({entry.name for entry in directory.iterdir()} - {MANIFEST_FILE} - manifest.files.keys())


def _check_listing(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    foreign = strays(directory, manifest)
    present = {entry.name for entry in directory.iterdir()} & manifest.files.keys()
    problems = [f"{name}: missing" for name in sorted(manifest.files.keys() - present)]
    problems += [f"{name}: not part of the checkpoint" for name in foreign if looks_like_ours(name)]
    for name in sorted(present):
        path = directory / name
        if not is_real_file(path):
            problems.append(f"{name}: not a regular file")
        elif (size := path.lstat().st_size) != manifest.files[name].size:
            problems.append(f"{name}: {size} bytes, expected {manifest.files[name].size}")
    _refuse(directory, problems)
    return manifest


def looks_like_ours(name: str) -> bool:
    """Whether a file that a checkpoint does not list could be taken for a part of it, by us or by torch: then
    two saves may be mixed up."""
    return name.endswith((".distcp", ".safetensors")) or name in (META_FILE, METADATA_FILE)


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
