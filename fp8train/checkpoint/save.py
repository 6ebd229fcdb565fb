"""Writes a checkpoint so that a kill, a power cut or a full disk at any moment leaves the previous one or the
new one.

Order: shards, index and ``meta.json`` into ``step_N.tmp``, all synced; the index read back and compared with
what the ranks hold; the manifest last; the directory renamed; the pointer replaced; only then are old
checkpoints deleted. Each step is agreed by all ranks before the next begins.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train import __version__
from fp8train.checkpoint.catalog import REPLACED_SUFFIX, delete_checkpoint, step_name, write_pointer
from fp8train.checkpoint.errors import CheckpointError, CorruptCheckpointError, explain_os_error
from fp8train.checkpoint.logical import LogicalTensor, as_logical
from fp8train.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    META_FILE,
    METADATA_FILE,
    SHARD_GLOB,
    FileEntry,
    Manifest,
    encode,
    file_entry,
    looks_like_ours,
    read_manifest,
)
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.readback import Keys, check_index, describe
from fp8train.checkpoint.retention import Retention, delete_old, retain
from fp8train.checkpoint.visibility import LOCAL, View, await_all
from fp8train.files import TMP_SUFFIX, fsync_dir, is_real_dir, remove, write_durable

RANK_STATE_PREFIX = "rank_state/"
"""Of the stored names of per-rank tensors: ``rank_state/<rank>/<name>``."""

SavePhase = Literal["begin", "data", "manifest", "rename", "pointer", "retention"]
"""Moments of a save: before anything; before each tensor; before the manifest, the rename, the pointer, the
deletions.
"""

_logger = logging.getLogger(__name__)


def no_hook(phase: SavePhase) -> None:
    """The hook of a save that nobody watches."""


@dataclass(frozen=True)
class Order:
    """A save to be done: where to, and what every step of it needs."""

    root: Path
    """Directory of the run's checkpoints, on a file system that all ranks see."""
    step: int
    """Optimizer steps done."""
    meta: Mapping[str, Any]
    """JSON values, the same on all ranks (rank 0's are written)."""
    keys: Keys
    """Of all tensors that this rank holds, whoever writes them."""
    retention: Retention
    """What to keep of the older ones."""
    on_phase: Callable[[SavePhase], None] = no_hook
    """Called at the moments of :data:`SavePhase`; what it raises breaks the save off."""
    must_be_finite: tuple[str, ...] = ()
    """Prefixes of the tensors that are looked at while they are written."""
    view: View = LOCAL
    """How long to wait until every rank sees what another one wrote."""

    @property
    def final(self) -> Path:
        """The directory of the complete checkpoint."""
        return self.root / step_name(self.step)

    @property
    def tmp(self) -> Path:
        """The directory in which the checkpoint is written, renamed to :attr:`final` at the end."""
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
    keep_every: int = 0,
    keep_best: int = 0,
    on_phase: Callable[[SavePhase], None] = no_hook,
) -> Path:
    """Save ``root/step_XXXXXXXX/`` and make it the newest; collective over ``group``. Returns the directory.

    ``tensors``: this rank's tensors by name; plain ones are replicated (any rank's copy is written), a
    :class:`LogicalTensor` is one rectangle; ranks may hold different names. ``meta``, ``on_phase``: see
    :class:`Order`. ``rank_state``: tensors of this rank alone, such as random states. ``group``: a process
    group that carries CPU objects (gloo), or None for a single process. ``keep_*``: what to retain, see
    :class:`~fp8train.checkpoint.retention.Retention`.

    An existing checkpoint of the same step is replaced, unless another version of this program wrote it
    (:class:`OtherFormatError`). Raises :class:`CheckpointError` on every rank when
    any rank fails (disk full, no permission); then the temporary directory is gone and the previous
    checkpoint is still the newest.
    """
    ranks = Ranks(group)
    held = with_rank_state(tensors, rank_state, ranks.rank)
    rules = Retention(keep_last, keep_every, keep_best)
    order = Order(root, step, meta, describe(held), rules, on_phase)
    write_checkpoint(order, held, ranks)
    return order.final


def write_checkpoint(
    order: Order, tensors: dict[str, LogicalTensor], ranks: Ranks, *, in_thread: bool = False
) -> int:
    """Carry out ``order``; collective over ``ranks``, errors as in :func:`save_checkpoint`.

    ``tensors``: what this rank offers to write; together the ranks must offer every rectangle. Takes part in
    no other group and, ``in_thread``, touches nothing that belongs to the process; the tensors must then be
    on the host. Returns the checkpoint's bytes. Raises :class:`NotFiniteError` for a tensor of
    :attr:`Order.must_be_finite` that is not; nothing is changed then.
    """
    committed = False
    try:
        ranks.first(lambda: _prepare(order))
        tmp, view = order.tmp, order.view

        def begin() -> None:
            view.wait(tmp, ranks.rank, lambda: view.size(tmp) is not None)
            order.on_phase("begin")

        ranks.agree(begin)  # a rank that stops here must not let the others wait in the next collective
        _write_shards(order, tensors, ranks, in_thread)
        written = ranks.each(lambda: (_digest_own_shards(order, ranks.rank), order.keys))
        shards = {name: entry for files, _ in written for name, entry in files.items()}
        num_bytes = ranks.first(lambda: _commit(order, shards, [keys for _, keys in written], ranks.size))
        committed = True
        await_all(order.final / MANIFEST_FILE, ranks, view)
    finally:
        if not committed and ranks.is_first:
            _discard(order.tmp)
    ranks.first(lambda: _publish(order))
    return num_bytes


def with_rank_state(
    tensors: Mapping[str, Tensor | LogicalTensor], rank_state: Mapping[str, Tensor], rank: int
) -> dict[str, LogicalTensor]:
    """All tensors of a rank under the names that they are stored by."""
    assert not any(key.startswith(RANK_STATE_PREFIX) for key in tensors), f"{RANK_STATE_PREFIX} is reserved"
    return as_logical(
        {**tensors, **{f"{RANK_STATE_PREFIX}{rank}/{key}": value for key, value in rank_state.items()}}
    )


def _prepare(order: Order) -> None:
    order.root.mkdir(parents=True, exist_ok=True)
    if order.final.is_symlink():
        raise CheckpointError(
            f"{order.final} is a symbolic link; remove it: checkpoints are never written through links"
        )
    if is_real_dir(order.final):
        with suppress(CorruptCheckpointError):
            read_manifest(order.final)
    remove(order.tmp)
    order.tmp.mkdir(exist_ok=True)  # there with what an NFS client does not let go


def _write_shards(order: Order, tensors: dict[str, LogicalTensor], ranks: Ranks, in_thread: bool) -> None:
    import torch.distributed.checkpoint as dcp  # slow to import, so not before the first save

    from fp8train.checkpoint.planners import LogicalSavePlanner
    from fp8train.checkpoint.shard_files import ShardWriter, dcp_call

    planner = LogicalSavePlanner(
        check_space=lambda needed: _check_space(order, needed),
        on_item=lambda: order.on_phase("data"),
        must_be_finite=order.must_be_finite,
    )
    with dcp_call(in_thread=in_thread):
        dcp.save(
            tensors,
            storage_writer=ShardWriter(order.tmp, in_thread=in_thread),
            planner=planner,
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )


def _check_space(order: Order, needed: int) -> None:
    """Refuse before the first byte: a disk that fills halfway wastes minutes and other jobs' writes."""
    free = shutil.disk_usage(order.root).free
    if needed > free:
        raise CheckpointError(
            f"no room for the checkpoint of step {order.step}: it needs {_mib(needed)}, {order.root} has "
            f"{_mib(free)} free; free some space or lower `keep_last`"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _digest_own_shards(order: Order, rank: int) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in order.tmp.glob(SHARD_GLOB.format(rank=rank))}


def _commit(order: Order, shards: Mapping[str, FileEntry], keys: list[Keys], world_size: int) -> int:
    """Complete the temporary directory, check it and give it its name; rank 0. Returns its bytes."""
    write_durable(
        order.tmp / META_FILE, json.dumps({"step": order.step, "meta": dict(order.meta)}, indent=1).encode()
    )
    files = {**shards, **{name: file_entry(order.tmp / name) for name in (META_FILE, METADATA_FILE)}}
    for name, entry in shards.items():
        _await_shard(order, order.tmp / name, entry.size)
    present = {entry.name for entry in order.tmp.iterdir()}
    foreign = {name for name in present - set(files) if looks_like_ours(name)}
    assert set(files) <= present and not foreign, (
        f"{order.tmp} holds {sorted(present)}, the manifest {sorted(files)}"
    )
    check_index(order.tmp, files, keys)
    order.on_phase("manifest")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        step=order.step,
        world_size=world_size,
        torch=torch.__version__,
        fp8train=__version__,
        files=files,
    )
    encoded = encode(manifest)
    write_durable(order.tmp / MANIFEST_FILE, encoded)
    fsync_dir(order.tmp)
    order.on_phase("rename")
    replaced = order.final.with_name(f"{order.final.name}{REPLACED_SUFFIX}")
    if is_real_dir(order.final):
        if is_real_dir(replaced):
            delete_checkpoint(replaced)
        order.final.rename(replaced)
    order.tmp.rename(order.final)
    fsync_dir(order.root)
    return len(encoded) + sum(entry.size for entry in files.values())


def _await_shard(order: Order, path: Path, size: int) -> None:
    order.view.wait(path, 0, lambda: order.view.size(path) == size)


def _publish(order: Order) -> None:
    """Move the pointer, then delete what it makes superfluous; rank 0."""
    order.on_phase("pointer")
    write_pointer(order.root, order.final)
    order.on_phase("retention")
    replaced = order.final.with_name(f"{order.final.name}{REPLACED_SUFFIX}")
    if is_real_dir(replaced):
        delete_old(replaced)
    retain(order.root, order.retention, newest=order.step)


def _discard(tmp: Path) -> None:
    """Remove a failed save. The failure itself is on its way to the caller, so trouble here only warns."""
    try:
        remove(tmp)
    except OSError as error:
        _logger.warning("could not remove the failed save %s: %s", tmp, explain_os_error(error))
