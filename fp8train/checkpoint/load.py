"""Reads a checkpoint into the tensors of a run that may be laid out otherwise than the one that saved it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from fp8train.checkpoint.catalog import step_of
from fp8train.checkpoint.errors import CorruptCheckpointError
from fp8train.checkpoint.logical import LogicalTensor, as_logical
from fp8train.checkpoint.manifest import Manifest, Verify, read_meta_file, verify_checkpoint
from fp8train.checkpoint.planners import LogicalLoadPlanner
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.safe_metadata import METADATA_FILE, read_metadata
from fp8train.checkpoint.save import RANK_STATE_PREFIX
from fp8train.checkpoint.storage import ShardReader, dcp_call


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds besides the tensors that were filled in place."""

    path: Path
    """Its directory."""
    step: int
    """Optimizer steps done when it was saved."""
    meta: dict[str, Any]
    """The JSON values given at the save."""
    rank_state: dict[str, Tensor] | None
    """This rank's own tensors, on the CPU; None when another number of ranks saved it, for then they belong
    to nobody.
    """
    world_size: int
    """Number of ranks that saved it."""
    versions: dict[str, str]
    """Versions of ``torch`` and ``fp8train`` that wrote it."""


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON values given at the save of the (already verified) checkpoint at ``path``."""
    return read_meta_file(path)[1]


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor | LogicalTensor],
    *,
    group: dist.ProcessGroup | None,
    verify: Verify = "full",
    allow_unexpected: bool = False,
) -> LoadedCheckpoint:
    """Fill ``tensors`` in place from the checkpoint directory ``path``; collective over ``group``.

    ``tensors`` as in ``save_checkpoint``; any rectangles do, whatever layout was saved. ``allow_unexpected``
    accepts stored tensors that nobody asks for (a model without its optimizer); everything asked for must be
    there, with equal global shape and dtype. ``verify="size"`` skips the SHA-256 of big files, for a
    checkpoint that ``find_checkpoint`` has just verified.

    Raises :class:`CorruptCheckpointError` for damaged or unsafe files and :class:`CheckpointError` for a
    checkpoint that does not fit, on every rank and before any tensor is touched.
    """
    ranks = Ranks(group)
    manifest = verify_checkpoint(path, ranks=ranks, mode=verify)
    meta, metadata, own = ranks.agree(lambda: _read_description(path, manifest, ranks))
    prefix = f"{RANK_STATE_PREFIX}{ranks.rank}/"
    wanted = as_logical({**tensors, **{f"{prefix}{name}": value for name, value in own.items()}})
    planner = LogicalLoadPlanner(
        allow_unexpected=allow_unexpected, ignore=lambda key: key.startswith(RANK_STATE_PREFIX)
    )
    with dcp_call():
        dcp.load(
            wanted,
            storage_reader=ShardReader(path, metadata),
            planner=planner,
            process_group=ranks.group,
            no_dist=ranks.group is None,
        )
    return LoadedCheckpoint(
        path=path,
        step=manifest.step,
        meta=meta,
        rank_state=own if manifest.world_size == ranks.size else None,
        world_size=manifest.world_size,
        versions={"torch": manifest.torch, "fp8train": manifest.fp8train},
    )


def _read_description(
    path: Path, manifest: Manifest, ranks: Ranks
) -> tuple[dict[str, Any], Metadata, dict[str, Tensor]]:
    """Meta values, index, and empty tensors for this rank's state."""
    step, meta = read_meta_file(path)
    named = step_of(path)
    if step != manifest.step or named not in (None, step):
        raise CorruptCheckpointError(
            f"{path}: is the checkpoint of step {manifest.step} (meta: {step}), not of its name"
        )
    metadata = read_metadata(path / METADATA_FILE, manifest.files)
    own: dict[str, Tensor] = {}
    if manifest.world_size == ranks.size:
        prefix = f"{RANK_STATE_PREFIX}{ranks.rank}/"
        for key, stored in metadata.state_dict_metadata.items():
            if key.startswith(prefix):
                own[key.removeprefix(prefix)] = torch.empty(stored.size, dtype=stored.properties.dtype)  # type: ignore[union-attr]
    return meta, metadata, own
