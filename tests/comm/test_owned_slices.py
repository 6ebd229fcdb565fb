"""Sums of slices at their owners: the values, the bytes, and that nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.owned_slices import OwnedSlice, sum_to_owners
from fp8train.numerics.block_scales import as_blocks, quantize_blocks
from fp8train.precision.number_formats import E4M3, E5M2
from tests.distributed.pool import GlooPool

SIZE, BLOCK = 1500, 64
SLICES = [
    OwnedSlice(0, 200, 0, True),
    OwnedSlice(200, 264, 1, True),
    OwnedSlice(264, 300, 1, False),
    OwnedSlice(300, 301, 2, True),
    OwnedSlice(301, 900, 0, False),
    OwnedSlice(900, 1500, 0, True),
]


def bucket(rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    size = torch.exp(1.5 * torch.randn(SIZE, generator=generator))
    return (1e-4 * size * torch.randn(SIZE, generator=generator).sign()).to(dtype)


def reduce(group: dist.ProcessGroup, rank: int, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    counted, values = CountedGroup(group), bucket(rank, dtype)
    before = values.clone()
    found = sum_to_owners(values, SLICES, counted, fmt=E4M3, block=BLOCK, wide=dtype)
    assert torch.equal(values, before)
    broken = bucket(rank, dtype)
    if rank == world_size - 1:
        broken[950] = torch.inf
    spoilt = sum_to_owners(broken, SLICES, CountedGroup(group), fmt=E5M2, block=BLOCK, wide=dtype)
    nowhere = [OwnedSlice(0, 10, 1, True)]
    alone = sum_to_owners(values, nowhere, CountedGroup(group), fmt=E4M3, block=32, wide=dtype)
    return {"found": found, "sent": dict(counted.sent), "spoilt": spoilt, "alone": alone[0]}


def decoded(values: Tensor, block: int) -> Tensor:
    """What FP8 says of a slice, FP64."""
    payload, scales = quantize_blocks(as_blocks(values, block), E4M3)
    return (payload.double() * torch.exp2(scales.double() - 127)[:, None]).view(-1)[: len(values)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_and_bytes(gloo_pool: GlooPool, dtype: torch.dtype) -> None:
    buckets = [bucket(rank, dtype) for rank in range(3)]
    for rank, result in enumerate(gloo_pool.run(reduce, 3, dtype)):
        for one, values in zip(SLICES, result["found"], strict=True):
            assert (values is None) == (one.owner != rank)
            if values is None:
                continue
            exact = torch.stack([b[one.start : one.stop].double() for b in buckets]).sum(dim=0)
            error = float((values.double() - exact).norm() / exact.norm())
            assert values.dtype == torch.float32
            if one.in_plan:
                told = torch.stack([decoded(b[one.start : one.stop], BLOCK) for b in buckets]).sum(dim=0)
                assert (values.double() - told).abs().max() <= 2.0**-22 * told.abs().max()
                assert error < 2.0**-4 and (error > 1e-3 or len(values) == 1)
            else:
                assert error < (1e-6 if dtype == torch.float32 else 6e-3)
        # Blocks of 64 codes and a scale: 4 + 10 for rank 0, 1 for rank 1, 1 for rank 2; others by all-reduce.
        owned = [14 * 65, 65, 65]
        assert result["sent"]["all_to_all/gradient"] == sum(owned) - owned[rank]
        assert result["sent"]["all_reduce/gradient_wide"] == 2 * (36 + 599) * dtype.itemsize * 2 // 3
        assert (result["alone"] is None) == (rank != 1)
        if rank == 0:  # one infinity spoils its block, and that alone
            spoilt = result["spoilt"][-1].isnan().nonzero().view(-1)
            assert spoilt.tolist() == list(range(BLOCK))


def test_one_rank_decodes_what_it_cast() -> None:
    values, alone = bucket(0, torch.float32), CountedGroup(None)
    (found,) = sum_to_owners(values, SLICES[:1], alone, fmt=E4M3, block=BLOCK, wide=torch.float32)
    assert found is not None and torch.equal(found.double(), decoded(values[:200], BLOCK))
