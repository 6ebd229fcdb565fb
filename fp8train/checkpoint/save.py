"""Writes a checkpoint so that a kill, a power cut or a full disk at any moment leaves the previous one or the
new one.

Order: shards, index and ``meta.json`` into ``step_N.tmp``, all synced; the manifest last; the directory
renamed; the pointer replaced; only then are old checkpoints deleted. Each step is agreed by all ranks before
the next begins.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fp8train import __version__
from fp8train.checkpoint.catalog import (
    REPLACED_SUFFIX,
    delete_checkpoint,
    retain,
    step_name,
    write_pointer,
)
from fp8train.checkpoint.errors import CheckpointError, explain_os_error
from fp8train.checkpoint.files import TMP_SUFFIX, fsync_dir, is_real_dir, remove, write_durable
from fp8train.checkpoint.logical import LogicalTensor, as_logical
from fp8train.checkpoint.manifest import MANIFEST_FILE, META_FILE, FileEntry, Manifest, encode, file_entry
from fp8train.checkpoint.planners import LogicalSavePlanner
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.safe_metadata import METADATA_FILE
from fp8train.checkpoint.storage import SHARD_GLOB, ShardWriter, dcp_call

RANK_STATE_PREFIX = "rank_state/"
"""Of the stored names of per-rank tensors: ``rank_state/<rank>/<name>``."""

SavePhase = Literal["begin", "data", "manifest", "rename", "pointer", "retention"]
"""Moments of a save: before anything; before each tensor; before the manifest, the rename, the pointer, the
deletions.
"""

_logger = logging.getLogger(__name__)


def _no_hook(phase: SavePhase) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class _Save:
    """One save in progress: what every step of it needs."""

    root: Path
    step: int
    ranks: Ranks
    on_phase: Callable[[SavePhase], None]

    @property
    def final(self) -> Path:
        return self.root / step_name(self.step)

    @property
    def tmp(self) -> Path:
        return self.root / f"{step_name(self.step)}{TMP_SUFFIX}"


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor | LogicalTensor],
    *,
    meta: Mapping[str, Any],
    rank_state: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    keep_last: int,
    on_phase: Callable[[SavePhase], None] = _no_hook,
) -> Path:
    """Save ``root/step_XXXXXXXX/`` and make it the newest; collective over ``group``. Returns the directory.

    ``tensors``: this rank's tensors by name; plain ones are replicated (any rank's copy is written), a
    :class:`LogicalTensor` is one rectangle; ranks may hold different names. ``meta``: JSON values, the same
    on all ranks (rank 0's are written). ``rank_state``: tensors of this rank alone, such as random states.
    ``group``: a process group that carries CPU objects (gloo), or None for a single process; the directory
    must be on a file system that all ranks see. ``keep_last``: complete checkpoints to retain, at least 1.
    ``on_phase`` is called at the moments of :data:`SavePhase`.

    An existing checkpoint of the same step is replaced. Raises :class:`CheckpointError` on every rank when
    any rank fails (disk full, no permission); then the temporary directory is gone and the previous
    checkpoint is still the newest.
    """
    save = _Save(root, step, Ranks(group), on_phase)
    committed = False
    try:
        save.ranks.first(lambda: _prepare(save))
        on_phase("begin")
        _write_shards(save, _with_rank_state(tensors, rank_state, save.ranks.rank))
        own_files = save.ranks.each(lambda: _digest_own_shards(save))
        save.ranks.first(lambda: _commit(save, meta, {k: v for files in own_files for k, v in files.items()}))
        committed = True
    finally:
        if not committed and save.ranks.is_first:
            _discard(save.tmp)
    save.ranks.first(lambda: _publish(save, keep_last))
    return save.final


def _prepare(save: _Save) -> None:
    save.root.mkdir(parents=True, exist_ok=True)
    if save.final.is_symlink():
        raise CheckpointError(
            f"{save.final} is a symbolic link; remove it: checkpoints are never written through links"
        )
    remove(save.tmp)
    save.tmp.mkdir()


def _with_rank_state(
    tensors: Mapping[str, Tensor | LogicalTensor], rank_state: Mapping[str, Tensor], rank: int
) -> dict[str, LogicalTensor]:
    assert not any(key.startswith(RANK_STATE_PREFIX) for key in tensors), f"{RANK_STATE_PREFIX} is reserved"
    return as_logical(
        {**tensors, **{f"{RANK_STATE_PREFIX}{rank}/{key}": value for key, value in rank_state.items()}}
    )


def _write_shards(save: _Save, tensors: dict[str, LogicalTensor]) -> None:
    planner = LogicalSavePlanner(
        check_space=lambda needed: _check_space(save, needed), on_item=lambda: save.on_phase("data")
    )
    with dcp_call():
        dcp.save(
            tensors,
            storage_writer=ShardWriter(save.tmp),
            planner=planner,
            process_group=save.ranks.group,
            no_dist=save.ranks.group is None,
        )


def _check_space(save: _Save, needed: int) -> None:
    """Refuse before the first byte: a disk that fills halfway wastes minutes and other jobs' writes."""
    free = shutil.disk_usage(save.root).free
    if needed > free:
        raise CheckpointError(
            f"no room for the checkpoint of step {save.step}: it needs {_mib(needed)}, {save.root} has "
            f"{_mib(free)} free; free some space or lower checkpoint.keep_last"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _digest_own_shards(save: _Save) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in save.tmp.glob(SHARD_GLOB.format(rank=save.ranks.rank))}


def _commit(save: _Save, meta: Mapping[str, Any], shards: Mapping[str, FileEntry]) -> None:
    """Complete the temporary directory and give it its name; rank 0."""
    write_durable(
        save.tmp / META_FILE, json.dumps({"step": save.step, "meta": dict(meta)}, indent=1).encode()
    )
    files = {**shards, **{name: file_entry(save.tmp / name) for name in (META_FILE, METADATA_FILE)}}
    present = {entry.name for entry in save.tmp.iterdir()}
    assert present == set(files), f"{save.tmp} holds {sorted(present)}, the manifest {sorted(files)}"
    save.on_phase("manifest")
    manifest = Manifest(
        format_version=1,
        step=save.step,
        world_size=save.ranks.size,
        torch=torch.__version__,
        fp8train=__version__,
        files=files,
    )
    write_durable(save.tmp / MANIFEST_FILE, encode(manifest))
    fsync_dir(save.tmp)
    save.on_phase("rename")
    replaced = save.final.with_name(f"{save.final.name}{REPLACED_SUFFIX}")
    if is_real_dir(save.final):
        if is_real_dir(replaced):
            delete_checkpoint(replaced)
        save.final.rename(replaced)
    save.tmp.rename(save.final)
    fsync_dir(save.root)


def _publish(save: _Save, keep_last: int) -> None:
    """Move the pointer, then delete what it makes superfluous; rank 0."""
    save.on_phase("pointer")
    write_pointer(save.root, save.final)
    save.on_phase("retention")
    replaced = save.final.with_name(f"{save.final.name}{REPLACED_SUFFIX}")
    if is_real_dir(replaced):
        delete_checkpoint(replaced)
    retain(save.root, keep_last=keep_last, newest=save.step)


def _discard(tmp: Path) -> None:
    """Remove a failed save. The failure itself is on its way to the caller, so trouble here only warns."""
    try:
        remove(tmp)
    except OSError as error:
        _logger.warning("could not remove the failed save %s: %s", tmp, explain_os_error(error))
