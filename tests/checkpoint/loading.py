"""A checkpoint filled into tensors in one call, with what it says beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fp8train.checkpoint.load import open_checkpoint
from fp8train.checkpoint.logical import LogicalTensor


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a checkpoint holds besides the tensors that were filled in place."""

    path: Path
    step: int
    meta: dict[str, Any]
    rank_state: dict[str, Tensor] | None
    """This rank's own tensors; None when another number of ranks saved it."""
    world_size: int
    versions: dict[str, str]


def load_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor | LogicalTensor],
    *,
    group: dist.ProcessGroup | None,
    allow_unexpected: bool = False,
) -> LoadedCheckpoint:
    """Fill ``tensors`` in place, and this rank's own state; collective over ``group``. ``allow_unexpected``:
    stored tensors that nobody asks for are left out."""
    opened = open_checkpoint(path, group=group)
    own = opened.rank_state()
    opened.load(tensors, rank_state=own, unwanted=lambda name: allow_unexpected)
    manifest = opened.manifest
    versions = {"torch": manifest.torch, "fp8train": manifest.fp8train}
    return LoadedCheckpoint(path, manifest.step, opened.meta, own, manifest.world_size, versions)
