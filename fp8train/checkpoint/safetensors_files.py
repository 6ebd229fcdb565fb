"""Writes tensors as safetensors, in shards with an index as Hugging Face names them.

One shard is in memory at a time. A file has its name once it is whole and synced, the index is written last,
and a full disk leaves no half of a file.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fp8train.checkpoint.errors import CheckpointError, explain_os_error
from fp8train.files import TMP_SUFFIX, fsync_dir, replace_file

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_UNITS = {
    **{"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}

Part = tuple[Mapping[str, int], Callable[[], Mapping[str, Tensor]]]
"""Tensors that are made at once: their sizes in bytes by name, and what makes them when it is their turn."""


def parse_size(text: str) -> int:
    """Bytes of ``--max-shard-size``: ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        CheckpointError: it is none of these, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise CheckpointError(
            f"--max-shard-size {text}: not a size; write bytes, or for instance 500MB or 5GB"
        )
    return size


def shards_of(parts: Sequence[Part], *, max_bytes: int) -> Iterator[list[Part]]:
    """Parts in order, as many to a shard as fit; one that is larger alone gets a shard of its own."""
    shard: list[Part] = []
    filled = 0
    for part in parts:
        size = sum(part[0].values())
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(part)
        filled += size
    yield shard


def file_names(stem: str, num_shards: int) -> list[str]:
    """``STEM.safetensors``, or with several shards ``STEM-00001-of-0000N.safetensors`` and so on."""
    if num_shards == 1:
        return [f"{stem}{SUFFIX}"]
    return [f"{stem}-{i:05d}-of-{num_shards:05d}{SUFFIX}" for i in range(1, num_shards + 1)]


def write_safetensors(
    folder: Path,
    stem: str,
    parts: Sequence[Part],
    *,
    max_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in as many files as their size asks for, and an index of several.

    Args:
        folder: exists.
        stem: of the names, see :func:`file_names`; with several shards ``STEM.safetensors.index.json`` says
            which file holds what.
        parts: the tensors.
        max_bytes: of a file, unless a single part is larger.
        metadata: of every file and the index, besides its format.

    Raises:
        CheckpointError: a file cannot be written.
    """
    shards = list(shards_of(parts, max_bytes=max_bytes))
    names = file_names(stem, len(shards))
    described = {"format": "pt", **(metadata or {})}
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: tensor for _, produce in shard for key, tensor in produce().items()}
        _write(folder / name, tensors, described)
    if len(shards) > 1:
        pairs = zip(names, shards, strict=True)
        places = {key: name for name, shard in pairs for sizes, _ in shard for key in sizes}
        total = sum(sum(sizes.values()) for sizes, _ in parts)
        index = {"metadata": {"total_size": total, **(metadata or {})}, "weight_map": places}
        replace_file(folder / f"{stem}{INDEX_SUFFIX}", (json.dumps(index, indent=2) + "\n").encode())


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tmp = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        tmp.touch()
        mode = stat.S_IMODE(tmp.stat().st_mode)  # what the umask leaves; safetensors leaves it to its owner
        save_file(tensors, tmp, metadata=metadata)
        tmp.chmod(mode)
        with tmp.open("rb") as stream:
            os.fsync(stream.fileno())
        tmp.rename(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {explain_os_error(error)}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        tmp.unlink(missing_ok=True)
