"""Checks, before a checkpoint counts, that the index on disk says what was meant to be written.

A writer with a stale plan saves happily and leaves tensors out, and every later run fails to load. So the
names, shapes and types that the ranks hold, which come from the run and not from the save's plan, are
compared with the index as it lies on disk, and the index with the sizes of the shard files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fp8train.checkpoint.errors import CorruptCheckpointError, shorten
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.manifest import METADATA_FILE, FileEntry

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Keys = dict[str, str]
"""Shape and type of each logical tensor by name, as text."""


def describe(tensors: Mapping[str, LogicalTensor]) -> Keys:
    """Describe what one rank holds: shape and type of each logical tensor, as text."""
    return {name: f"{tuple(t.global_shape)} {t.local.dtype}" for name, t in tensors.items()}


def check_index(
    directory: Path, files: Mapping[str, FileEntry], expected: Iterable[Keys] | None = None
) -> None:
    """Compare the index in ``directory`` with its shard files and with what the ranks hold.

    Args:
        directory: of the checkpoint.
        files: its files with their sizes, from the disk.
        expected: of all ranks; None where only the files are left.

    Raises:
        CorruptCheckpointError: a tensor is missing, foreign, of another shape or type, not wholly covered, or
            outside its file.
    """
    from fp8train.checkpoint.safe_metadata import read_metadata  # with torch's checkpoints: slow to import

    metadata = read_metadata(directory / METADATA_FILE, files)
    stored: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # type: ignore[assignment]
    found = {name: f"{tuple(one.size)} {one.properties.dtype}" for name, one in stored.items()}
    wanted = found if expected is None else {name: kind for keys in expected for name, kind in keys.items()}
    problems = [f"{name}: not written" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name}: written, but no rank holds it" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        covered = sum(math.prod(chunk.sizes) for chunk in stored[name].chunks)
        if found[name] != wanted[name]:
            problems.append(f"{name}: written as {found[name]}, held as {wanted[name]}")
        elif covered != math.prod(stored[name].size):
            problems.append(f"{name}: {covered} of {math.prod(stored[name].size)} elements written")
    for index, place in (metadata.storage_data or {}).items():
        if place.offset + place.length > files[place.relative_path].size:
            problems.append(f"{index.fqn}: ends after {place.relative_path}")
    if problems:
        raise CorruptCheckpointError(f"{directory}: its index is wrong:\n{shorten(problems)}")
