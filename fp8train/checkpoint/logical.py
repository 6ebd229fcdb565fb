"""Logical tensors: what a checkpoint stores, independent of how ranks cut them.

A tensor of the model is one rectangle of numbers with a global shape. Each rank holds a rectangle of it; two
ranks may hold the same rectangle (replicas). A checkpoint stores every element once, so any other layout can
be read back: the new rank's rectangle is the union of its intersections with the stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # torch's checkpoints take a second to import: for those who save or load
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata


@dataclass(frozen=True)
class LogicalTensor:
    """One rank's rectangle of a logical tensor."""

    local: Tensor
    """The rank's own elements, any dtype, any device. Loading writes into it."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Index of the rectangle's first element in the whole tensor, one number per dimension."""
    read: Callable[[], Tensor] | None = None
    """Saving only: gives the elements when it is their turn to be written, so that a state larger than memory
    can be saved; ``local`` then says shape and dtype alone (on the meta device)."""

    def __post_init__(self) -> None:
        shape, ndim = tuple(self.local.shape), self.local.dim()
        assert {len(self.global_shape), len(self.offset)} == {ndim}, (
            f"rectangle {shape} at {self.offset} of a tensor {self.global_shape}: dimensions differ in number"
        )
        assert all(
            start >= 0 and start + size <= whole
            for start, size, whole in zip(self.offset, shape, self.global_shape, strict=True)
        ), f"rectangle {shape} at {self.offset} leaves the tensor {self.global_shape}"


def as_logical(tensors: Mapping[str, Tensor | LogicalTensor]) -> dict[str, LogicalTensor]:
    """Describe every tensor as a :class:`LogicalTensor`; plain ones are replicated, so their rectangle is the
    whole."""
    return {
        key: value
        if isinstance(value, LogicalTensor)
        else LogicalTensor(value, tuple(value.shape), (0,) * value.dim())
        for key, value in tensors.items()
    }


def check_tiling(name: str, shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> None:
    """Assert that ``chunks`` cover a tensor of ``shape`` exactly once.

    Rectangles inside the tensor, no two of which overlap and whose volumes add up to the whole, tile it.
    Overlap is searched by a sweep along the dimension with the most cuts: a sharding over thousands of ranks
    stays near-linear.
    """
    total, whole = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    assert total == whole, (
        f"{name}: ranks declare {total} elements of a tensor with {whole}; shards missing or doubled"
    )
    if len(chunks) == 1 or not shape:
        return
    sweep = max(range(len(shape)), key=lambda dim: len({chunk.offsets[dim] for chunk in chunks}))
    active: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda one: one.offsets[sweep]):
        active = [one for one in active if one.offsets[sweep] + one.sizes[sweep] > chunk.offsets[sweep]]
        for other in active:
            assert not _overlap(chunk, other), (
                f"{name}: shards at {tuple(chunk.offsets)} and {tuple(other.offsets)} overlap"
            )
        active.append(chunk)


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    return all(
        a_start < b_start + b_size and b_start < a_start + a_size
        for a_start, a_size, b_start, b_size in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
