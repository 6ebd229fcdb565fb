"""FP8 reduction by exchange: the sum it claims, on every rank, at the accuracy and the bytes it claims."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import Exchange, HierarchicalExchange, padded_blocks
from fp8train.numerics.block_scales import dequantize_blocks, quantize_blocks
from fp8train.precision.number_formats import E4M3

BLOCKS, BLOCK = 24, 96


def gradient(rank: int, common: float = 0.5, blocks: int = BLOCKS) -> Tensor:
    """Heavy-tailed values [blocks, BLOCK] FP32, part of which all ranks share."""

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        magnitude = torch.exp(1.5 * torch.randn(blocks, BLOCK, generator=generator))
        return magnitude * torch.randn(blocks, BLOCK, generator=generator).sign()

    return 1e-4 * (math.sqrt(common) * draw(1000) + math.sqrt(1 - common) * draw(rank))


def expected_sum(values: list[Tensor]) -> Tensor:
    """Decoded contributions added in rank order in FP32, by arithmetic of its own."""
    total = torch.zeros_like(values[0])
    for value in values:
        payload, scales = quantize_blocks(value, E4M3)
        total = total + payload.float() * torch.exp2(scales.float() - 127)[:, None]
    return total


def reduce_all(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, Any]:
    """Runs in the pool: every form of the reduction once."""
    counted = CountedGroup(group)
    result: dict[str, Any] = {}
    exchange = Exchange(counted, E4M3, purpose="test")
    exchange.start(*quantize_blocks(gradient(rank), E4M3))
    exchange.advance()
    payload, scales = exchange.finish()
    result["sum"] = payload.view(torch.uint8), scales
    result["sent"] = dict(counted.sent)
    exchange.start(*quantize_blocks(gradient(rank), E4M3))
    result["part"] = exchange.sums()

    exact = torch.full((BLOCKS, BLOCK), float(rank + 1)) * torch.exp2(torch.arange(BLOCKS) % 7.0)[:, None]
    exchange.start(*quantize_blocks(exact, E4M3))
    exchange.advance()
    result["exact"] = dequantize_blocks(*exchange.finish())

    broken = gradient(rank)
    if rank == world_size - 1:
        broken[5, 7] = math.inf
    exchange.start(*quantize_blocks(broken, E4M3))
    exchange.advance()
    result["broken"] = dequantize_blocks(*exchange.finish())
    if world_size == 4:
        result |= reduce_in_two_levels(rank)
    return result


def reduce_in_two_levels(rank: int) -> dict[str, Any]:
    """Two nodes of two ranks."""
    locals_ = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    crosses = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    result: dict[str, Any] = {}
    for between in ("fp8", "bf16"):
        local, cross = CountedGroup(locals_[rank // 2]), CountedGroup(crosses[rank % 2])
        exchange = HierarchicalExchange(local, cross, E4M3, between=between, purpose="test")  # type: ignore[arg-type]
        exchange.start(*quantize_blocks(gradient(rank), E4M3))
        exchange.advance()
        result[between] = dequantize_blocks(*exchange.finish())
        result[f"{between}_sent"] = dict(cross.sent)
    return result


def snr_db(value: Tensor, exact: Tensor) -> float:
    """Signal-to-noise ratio pooled by energy."""
    return float(10 * torch.log10(exact.double().square().sum() / (value.double() - exact).square().sum()))


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_hold_the_sum_that_the_definition_gives(gloo_pool, world_size: int) -> None:
    ranks = gloo_pool.run(reduce_all, world_size)
    values = [gradient(rank) for rank in range(world_size)]
    total = expected_sum(values)
    for rank, result in enumerate(ranks):
        share = BLOCKS // world_size
        assert torch.equal(result["part"], total[rank * share : (rank + 1) * share])
        payload, scales = quantize_blocks(total, E4M3)
        assert torch.equal(result["sum"][0], payload.view(torch.uint8))
        assert torch.equal(result["sum"][1], scales)

        powers = torch.exp2(torch.arange(BLOCKS) % 7.0)[:, None].expand(-1, BLOCK)
        assert torch.equal(result["exact"], powers * (world_size * (world_size + 1) / 2))

        bad = ~torch.isfinite(result["broken"])
        assert bool(bad[5].all())
        assert int(bad.sum()) == BLOCK

        # Each half sends codes and scales of all but the rank's own part.
        half = BLOCKS * (BLOCK + 1) * (world_size - 1) // world_size
        assert result["sent"] == {"all_to_all/test": half, "all_gather/test": half}

    if world_size == 4:
        exact = sum(value.double() for value in values)
        for between, floor in (("fp8", 26.0), ("bf16", 28.0)):
            assert all(torch.equal(r[between], ranks[0][between]) for r in ranks)
            assert snr_db(ranks[0][between], exact) >= floor
        part = BLOCKS // 2 * BLOCK  # what two ranks of different nodes share
        assert sum(ranks[0]["fp8_sent"].values()) == 2 * (part + BLOCKS // 2) // 2
        assert sum(ranks[0]["bf16_sent"].values()) == 2 * part // 2 + (part + BLOCKS // 2) // 2


@pytest.mark.parametrize("common", [0.02, 0.5])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_accuracy_does_not_fall_with_the_number_of_ranks(ranks: int, common: float) -> None:
    values = [gradient(rank, common, blocks=256) for rank in range(ranks)]
    exact = sum(value.double() for value in values)
    total = expected_sum(values)
    reduce_scatter = snr_db(total, exact)
    all_reduce = snr_db(dequantize_blocks(*quantize_blocks(total, E4M3)), exact)
    print(f"{ranks} ranks: reduce-scatter {reduce_scatter:.1f} dB, all-reduce {all_reduce:.1f} dB")
    assert reduce_scatter >= 31.0
    assert all_reduce >= 28.0


def test_padding_makes_equal_parts() -> None:
    assert [padded_blocks(count, 4) for count in (0, 1, 4, 5)] == [0, 4, 4, 8]
