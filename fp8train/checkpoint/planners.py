"""Plans for ``torch.distributed.checkpoint``: who writes which rectangle, and who reads what from where.

DCP asks a planner on every rank what it holds, lets rank 0 merge the answers, and does the I/O. torch's
default planners know DTensors; ours know :class:`LogicalTensor`, which costs no DTensor (whose gathers fail
for float8 on gloo) and keeps the sharding a plain fact: global shape and offset.

Saving: a rectangle that several ranks hold is written once, by the holder with the fewest bytes so far, so
replicated state spreads over all ranks' disks and links. Loading is strict: keys, shapes and dtypes are
compared on every rank before the first byte is read, since an in-place copy would silently cast.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fp8train.checkpoint.errors import CheckpointError, NotFiniteError, shorten
from fp8train.checkpoint.logical import LogicalTensor, check_tiling


class LogicalSavePlanner(SavePlanner):
    """Writes every rectangle of every logical tensor exactly once.

    ``check_space`` is called on rank 0 with the number of bytes to be written by all ranks, before any is; it
    may raise. ``on_item`` is called on each rank before each tensor is handed to storage. Tensors whose names
    begin with one of ``must_be_finite`` are looked at then, by the rank that writes them: one more pass over
    memory, little beside hashing and writing.
    """

    def __init__(
        self,
        check_space: Callable[[int], None],
        on_item: Callable[[], None],
        must_be_finite: tuple[str, ...] = (),
    ) -> None:
        self._check_space = check_space
        self._on_item = on_item
        self._must_be_finite = must_be_finite
        self._tensors: Mapping[str, LogicalTensor] = {}

    def set_up_planner(
        self,
        state_dict: Mapping[str, LogicalTensor],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Remember the tensors to write."""
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        """Offer to write every rectangle that this rank holds."""
        return SavePlan(write_items(self._tensors))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Choose one writer per rectangle; check that the rectangles tile every tensor and that they fit on
        the disk.
        """
        metadata = _merge(item for plan in all_plans for item in plan.items)
        chosen = choose_writers([plan.items for plan in all_plans])
        items = [item for rank_items in chosen for item in rank_items]
        self._check_space(sum(map(_num_bytes, items)) + _OVERHEAD_BYTES * (1 + len(items)))
        return [replace(plan, items=items) for plan, items in zip(all_plans, chosen, strict=True)], metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return what this rank shall write as it is: there is nothing to add."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The rectangle's elements, for the storage layer to copy to the host and write."""
        self._on_item()
        value = self._tensors[write_item.index.fqn]
        data = (value.local if value.read is None else value.read()).detach()
        name = write_item.index.fqn
        # Codes of 8 bits are left out: their scales, which are tensors too, are NaN where a source was.
        wide = data.is_floating_point() and data.itemsize > 1
        if wide and name.startswith(self._must_be_finite) and not bool(data.isfinite().all()):
            bad = data.numel() - int(data.isfinite().sum())
            raise NotFiniteError(f"{name}: {bad:,} of {data.numel():,} elements are NaN or infinite")
        return data


_OVERHEAD_BYTES = 4096
"""Of the archive around one stored tensor (about 1.5 KiB) and of its line in the index, rounded up."""


def write_items(tensors: Mapping[str, LogicalTensor]) -> list[WriteItem]:
    """The rectangles that a rank can offer to write."""
    return [_write_item(key, value) for key, value in tensors.items() if _holds_data(value)]


def choose_writers(offers: Sequence[Sequence[WriteItem]]) -> list[list[WriteItem]]:
    """What each rank writes of what the ranks offer: every rectangle once, by its holder with the fewest
    bytes so far, large ones first. A pure function of the offers: every rank can compute it."""
    holders: dict[MetadataIndex, list[tuple[int, WriteItem]]] = {}
    for rank, items in enumerate(offers):
        for item in items:
            holders.setdefault(item.index, []).append((rank, item))
    written = {index: item for index, [(_, item), *_] in holders.items()}
    loads = [0] * len(offers)
    chosen: list[list[WriteItem]] = [[] for _ in offers]
    for index in sorted(written, key=lambda one: (-_num_bytes(written[one]), one.fqn, one.offset or ())):
        rank, item = min(holders[index], key=lambda offer: (loads[offer[0]], offer[0]))
        loads[rank] += _num_bytes(item)
        chosen[rank].append(item)
    return chosen


def _holds_data(value: LogicalTensor) -> bool:
    """Empty rectangles are not stored, except of a wholly empty tensor: its shape must survive."""
    return value.local.numel() > 0 or math.prod(value.global_shape) == 0


def _write_item(key: str, value: LogicalTensor) -> WriteItem:
    offset = torch.Size(value.offset if value.local.numel() else (0,) * value.local.dim())
    return WriteItem(
        index=MetadataIndex(key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=value.local.shape),
            properties=TensorProperties(dtype=value.local.dtype),
            size=torch.Size(value.global_shape),
        ),
    )


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _merge(offers: Iterable[WriteItem]) -> Metadata:
    """All ranks' offers as one description per tensor, replicas folded."""
    tensors: dict[str, TensorStorageMetadata] = {}
    seen: dict[MetadataIndex, torch.Size] = {}
    for item in offers:
        data, key = item.tensor_data, item.index.fqn
        assert data is not None
        entry = tensors.setdefault(key, TensorStorageMetadata(data.properties, data.size, []))
        one, other = (entry.size, entry.properties.dtype), (data.size, data.properties.dtype)
        assert one == other, f"{key}: ranks disagree: {one} and {other}"
        if item.index not in seen:
            seen[item.index] = data.chunk.sizes
            entry.chunks.append(data.chunk)
        assert seen[item.index] == data.chunk.sizes, (
            f"{key}: two shards of different size at {item.index.offset}"
        )
    for key, entry in tensors.items():
        check_tiling(key, entry.size, entry.chunks)
    return Metadata(state_dict_metadata=dict(tensors))


class LogicalLoadPlanner(LoadPlanner):
    """Fills each rank's rectangles in place from whatever rectangles were stored.

    Raises :class:`CheckpointError` on every rank, before anything is read, when a key is missing, a shape or
    dtype differs, or the checkpoint holds a key that no rank asked for and that ``ignore`` does not accept.
    """

    def __init__(self, *, ignore: Callable[[str], bool]) -> None:
        self._ignore = ignore
        self._tensors: Mapping[str, LogicalTensor] = {}
        self._stored: Mapping[str, TensorStorageMetadata] = {}

    def set_up_planner(
        self,
        state_dict: Mapping[str, LogicalTensor],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Remember the tensors to fill and what is stored."""
        assert metadata is not None
        self._tensors, self._stored = state_dict, metadata.state_dict_metadata  # type: ignore[assignment]

    def create_local_plan(self) -> LoadPlan:
        """The intersections of this rank's rectangles with the stored ones; mismatches travel to rank 0
        beside them.
        """
        items: list[ReadItem] = []
        problems: list[str] = []
        for key, wanted in self._tensors.items():
            stored = self._stored.get(key)
            problem = _mismatch(key, wanted, stored)
            if problem:
                problems.append(problem)
            elif wanted.local.numel():
                assert stored is not None
                chunk = ChunkStorageMetadata(offsets=torch.Size(wanted.offset), sizes=wanted.local.shape)
                reads = create_read_items_for_chunk_list(key, stored, [chunk])
                assert sum(math.prod(read.lengths) for read in reads) == wanted.local.numel(), (
                    f"{key}: not covered"
                )
                items += reads
        return LoadPlan(items, planner_data=(sorted(self._tensors), problems))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Collect the mismatches of all ranks, on rank 0, and refuse if there is one."""
        problems = list(dict.fromkeys(line for plan in global_plan for line in plan.planner_data[1]))
        asked = {key for plan in global_plan for key in plan.planner_data[0]}
        unexpected = sorted(key for key in self._stored if key not in asked and not self._ignore(key))
        problems += [f"{key}: only in the checkpoint" for key in unexpected]
        if problems:
            raise CheckpointError(f"the checkpoint does not fit this run:\n{shorten(problems)}")
        return [replace(plan, planner_data=None) for plan in global_plan]

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return what this rank shall read as it is: there is nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        """Never called: everything stored is a tensor."""
        raise AssertionError(f"{read_item.dest_index.fqn}: not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the rank's tensor that this read fills; storage copies into it."""
        target = self._tensors[read_item.dest_index.fqn].local.detach()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor was filled in place."""


def _mismatch(key: str, wanted: LogicalTensor, stored: object) -> str:
    if stored is None:
        return f"{key}: not in the checkpoint"
    assert isinstance(stored, TensorStorageMetadata)
    have = f"{tuple(stored.size)} {stored.properties.dtype}".replace("torch.", "")
    want = f"{tuple(wanted.global_shape)} {wanted.local.dtype}".replace("torch.", "")
    return "" if have == want else f"{key}: checkpoint has {have}, run has {want}"
