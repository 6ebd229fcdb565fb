"""The check that shards tile a tensor, against counting every element."""

import random

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from fp8train.checkpoint.logical import check_tiling


def _tiles(shape: tuple[int, ...], chunks: list[ChunkStorageMetadata]) -> bool:
    count = torch.zeros(shape, dtype=torch.int64)
    for chunk in chunks:
        count[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    return bool((count == 1).all())


def _cut(shape: tuple[int, ...], rng: random.Random) -> list[ChunkStorageMetadata]:
    """A random tiling: split boxes at random places."""
    boxes = [([0] * len(shape), list(shape))]
    for _ in range(rng.randrange(6)):
        offsets, sizes = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        at = rng.randint(0, sizes[dim])
        for start, size in ((0, at), (at, sizes[dim] - at)):
            part = ([*offsets], [*sizes])
            part[0][dim] += start
            part[1][dim] = size
            boxes.append(part)
    boxes = [box for box in boxes if all(box[1])]
    rng.shuffle(boxes)
    return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]


def test_tilings_pass_and_moved_shards_are_found() -> None:
    rng = random.Random(11)
    outcomes = {True: 0, False: 0}
    for _ in range(500):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 3)))
        chunks = _cut(shape, rng)
        if rng.random() < 0.6:  # move one shard inside the tensor: the sum of volumes stays right
            victim = chunks[rng.randrange(len(chunks))]
            victim.offsets = torch.Size(
                rng.randint(0, whole - size) for whole, size in zip(shape, victim.sizes, strict=True)
            )
        expected = _tiles(shape, chunks)
        outcomes[expected] += 1
        if expected:
            check_tiling("w", shape, chunks)
        else:
            with pytest.raises(AssertionError, match="overlap"):
                check_tiling("w", shape, chunks)
    assert min(outcomes.values()) > 50


def test_missing_and_doubled_shards_are_counted() -> None:
    half = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    with pytest.raises(AssertionError, match="declare 2 elements of a tensor with 4"):
        check_tiling("w", (4,), [half])
    with pytest.raises(AssertionError, match="declare 6 elements of a tensor with 4"):
        check_tiling("w", (4,), [half] * 3)


def test_scalars_and_empty_tensors() -> None:
    check_tiling("s", (), [ChunkStorageMetadata(torch.Size([]), torch.Size([]))])
    check_tiling("e", (0, 4), [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([0, 4]))])
