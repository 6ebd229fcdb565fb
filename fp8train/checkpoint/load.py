"""Reads a checkpoint into the tensors of a run that may be laid out otherwise than the one that saved it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.checkpoint.catalog import step_of
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CorruptCheckpointError
from fp8train.checkpoint.logical import LogicalTensor, as_logical
from fp8train.checkpoint.manifest import METADATA_FILE, Manifest, Verify, verify_checkpoint
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.save import RANK_STATE_PREFIX

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


class StoredTensor(NamedTuple):
    """What an index says of a logical tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OpenCheckpoint:
    """A verified checkpoint whose tensors can be read; from :func:`open_checkpoint`."""

    path: Path
    """Its directory."""
    manifest: Manifest
    """Who wrote it, and when."""
    meta: dict[str, Any]
    """The JSON values given at the save."""
    metadata: Metadata
    """The index."""
    ranks: Ranks
    """Who opened it."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every logical tensor by name, but those of single ranks."""
        return {
            name: StoredTensor(tuple(stored.size), stored.properties.dtype)  # type: ignore[union-attr]
            for name, stored in self.metadata.state_dict_metadata.items()
            if not name.startswith(RANK_STATE_PREFIX)
        }

    def rank_state(self) -> dict[str, Tensor] | None:
        """Empty tensors for what this rank alone had saved, by the name it had; None when another number of
        ranks saved it, for then they belong to nobody. :meth:`load` fills them."""
        if self.manifest.world_size != self.ranks.size:
            return None
        prefix = self._rank_prefix
        return {
            name.removeprefix(prefix): torch.empty(stored.size, dtype=stored.properties.dtype)  # type: ignore[union-attr]
            for name, stored in self.metadata.state_dict_metadata.items()
            if name.startswith(prefix)
        }

    def rank_state_names(self) -> set[str]:
        """Names of what ranks alone had saved, of any rank and for any number of them."""
        saved = (name for name in self.metadata.state_dict_metadata if name.startswith(RANK_STATE_PREFIX))
        return {name.removeprefix(RANK_STATE_PREFIX).partition("/")[2] for name in saved}

    @property
    def _rank_prefix(self) -> str:
        return f"{RANK_STATE_PREFIX}{self.ranks.rank}/"

    def load(
        self,
        tensors: Mapping[str, Tensor | LogicalTensor],
        *,
        rank_state: Mapping[str, Tensor] | None = None,
        unwanted: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Fill ``tensors``, any rectangles, and ``rank_state`` in place; collective over the ranks that
        opened it.

        Everything asked for must be there, with equal global shape and dtype; stored tensors that nobody asks
        for must be ``unwanted``. Otherwise raises :class:`CheckpointError` on every rank before any tensor is
        touched.
        """
        own = {f"{self._rank_prefix}{name}": value for name, value in (rank_state or {}).items()}
        self._read({**tensors, **own}, unwanted, self.ranks.group)

    def read(self, tensors: Mapping[str, Tensor | LogicalTensor]) -> None:
        """Fill these in place, on this rank alone: other ranks need not call it. Errors as for
        :meth:`load`."""
        self._read(tensors, lambda name: True, None)

    def _read(
        self,
        tensors: Mapping[str, Tensor | LogicalTensor],
        unwanted: Callable[[str], bool],
        group: dist.ProcessGroup | None,
    ) -> None:
        import torch.distributed.checkpoint as dcp  # slow to import, so not before the first load

        from fp8train.checkpoint.planners import LogicalLoadPlanner
        from fp8train.checkpoint.shard_files import ShardReader, dcp_call

        planner = LogicalLoadPlanner(ignore=lambda name: name.startswith(RANK_STATE_PREFIX) or unwanted(name))
        with dcp_call():
            dcp.load(
                dict(as_logical(tensors)),
                storage_reader=ShardReader(self.path, self.metadata),
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )


def open_checkpoint(
    path: Path, *, group: dist.ProcessGroup | None, verify: Verify = "full"
) -> OpenCheckpoint:
    """Verify the checkpoint directory ``path`` and read what it says about itself; collective over ``group``.

    ``verify="size"`` skips the SHA-256 of big files, for a checkpoint that ``find_checkpoint`` has just
    verified. Raises :class:`CorruptCheckpointError` for damaged or unsafe files, on every rank.
    """
    ranks = Ranks(group)
    manifest = verify_checkpoint(path, ranks=ranks, mode=verify)
    meta, metadata = ranks.agree(lambda: _read_description(path, manifest))
    return OpenCheckpoint(path, manifest, meta, metadata, ranks)


def _read_description(path: Path, manifest: Manifest) -> tuple[dict[str, Any], Metadata]:
    """Meta values and index."""
    step, meta = read_meta_file(path)
    named = step_of(path)
    if step != manifest.step or named not in (None, step):
        raise CorruptCheckpointError(
            f"{path}: is the checkpoint of step {manifest.step} (meta: {step}), not of its name"
        )
    from fp8train.checkpoint.safe_metadata import read_metadata

    return meta, read_metadata(path / METADATA_FILE, manifest.files)
