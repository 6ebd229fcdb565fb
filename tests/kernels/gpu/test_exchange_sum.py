"""The launchers of an exchange's messages against their references and the definition, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import exchange_sum
from fp8train.kernels.exchange_sum import pack, sum_and_pack, sum_parts, unpack, unpack_into
from fp8train.numerics.block_scales import quantize_blocks
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, Format
from tests.kernels.gpu.same import same


def blocks_of(seed: int, blocks: int, block: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, block, generator=generator)
    return x * torch.exp2(torch.randint(-20, 20, (blocks, 1), generator=generator))


@pytest.mark.parametrize(("blocks", "block", "parts"), [(12, 128, 1), (12, 96, 4), (140, 32, 2), (0, 64, 2)])
def test_messages_are_packed_and_taken_apart(blocks: int, block: int, parts: int) -> None:
    payload, scales = quantize_blocks(blocks_of(0, blocks, block), E4M3)
    codes = payload.view(torch.uint8)
    message = exchange_sum._pack_op.launch(codes, scales, None, parts)
    assert same(message, pack(payload, scales, parts))
    per = blocks // parts
    for part in range(parts):
        own = slice(part * per, (part + 1) * per)
        for got, put in zip(unpack(message[part], block, payload.dtype), (payload, scales), strict=True):
            assert same(got, put[own])
    for call in (exchange_sum._unpack_op.launch, exchange_sum._unpack_op):
        back = torch.full_like(codes, 9), torch.full_like(scales, 9)
        call(message, *back)
        assert same(back[0], codes)
        assert same(back[1], scales)


def test_blocks_in_an_order_of_their_own() -> None:
    payload, scales = quantize_blocks(blocks_of(1, 7, 32), E4M3)
    order = torch.tensor([4, 0, -1, 6, 5, 1, 2, -1], dtype=torch.int32)
    message = exchange_sum._pack_op.launch(payload.view(torch.uint8), scales, order, 2)
    assert same(message, pack(payload, scales, 2, order=order))
    assert message.shape == exchange_sum._pack_parts_fake(payload, scales, order, 2).shape
    for part, places in enumerate(order.view(2, -1).tolist()):
        codes, own_scales = unpack(message[part], 32, torch.uint8)
        for code, scale, place in zip(codes, own_scales, places, strict=True):
            assert same(code, torch.zeros_like(code) if place < 0 else payload[place].view(torch.uint8))
            assert int(scale) == (127 if place < 0 else int(scales[place]))


def rounded(values: list[Tensor], fmt: Format | None, block: int) -> tuple[Tensor, list[Tensor]]:
    """Messages of all ranks, and what they stand for."""
    if fmt is None:
        narrow = [value.bfloat16() for value in values]
        return torch.stack([x.flatten() for x in narrow]), [x.float() for x in narrow]
    coded = [quantize_blocks(value, fmt) for value in values]
    wide = [payload.float() * torch.exp2(scales.float() - 127)[:, None] for payload, scales in coded]
    return torch.cat([pack(*one, 1) for one in coded]), wide


@pytest.mark.parametrize("source", [E4M3, E5M2, None], ids=["e4m3", "e5m2", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "blocks", "block", "parts"), [(1, 3, 128, 1), (2, 36, 96, 3), (5, 40, 128, 2), (9, 130, 32, 1)]
)
def test_sums_in_rank_order(ranks: int, blocks: int, block: int, parts: int, source: Format | None) -> None:
    fmt = source or E4M3
    values = [blocks_of(rank, blocks, block) for rank in range(ranks)]
    values[0][0] = -0.0
    for value in values:
        value[:1] = -0.0
    messages, wide = rounded(values, source, block)
    expected = wide[0]
    for value in wide[1:]:
        expected = expected + value
    args = messages, block, fmt.mantissa_bits
    launched, nothing = exchange_sum._sum_op.launch(*args, 0)
    assert nothing.numel() == 0
    assert same(launched, expected)
    assert same(sum_parts(messages, block, fmt), expected)
    assert launched.shape == exchange_sum._sum_parts_fake(*args, 0)[0].shape
    nothing, packed = exchange_sum._sum_op.launch(*args, parts)
    assert nothing.numel() == 0
    assert same(packed, sum_and_pack(messages, block, fmt, parts=parts))
    assert same(packed, pack(*quantize_blocks(expected, fmt), parts))
    assert packed.shape == exchange_sum._sum_parts_fake(*args, parts)[1].shape


def test_a_block_that_is_not_finite_stays_so() -> None:
    values = [blocks_of(rank, 6, 96) for rank in range(3)]
    values[1][2, 5] = torch.inf
    messages, _ = rounded(values, E4M3, 96)
    total, _ = exchange_sum._sum_op.launch(messages, 96, 3, 0)
    assert same(total, sum_parts(messages, 96, E4M3))
    _, packed = exchange_sum._sum_op.launch(messages, 96, 3, 1)
    theirs = sum_and_pack(messages, 96, E4M3)
    for ours, expected in zip(
        unpack(packed[0], 96, dtype_of(E4M3)), unpack(theirs[0], 96, dtype_of(E4M3)), strict=True
    ):
        assert same(ours, expected)
    assert unpack(packed[0], 96, dtype_of(E4M3))[1].eq(255).tolist() == [False, False, True] + [False] * 3


def test_without_memory() -> None:
    message = torch.empty(4, 10 * 33, dtype=torch.uint8, device="meta")
    assert sum_parts(message, 32, E4M3).shape == (10, 32)
    assert sum_and_pack(message, 32, E4M3, parts=5).shape == (5, 2 * 33)
    payload = torch.empty(40, 32, dtype=torch.float8_e4m3fn, device="meta")
    scales = torch.empty(40, dtype=torch.uint8, device="meta")
    unpack_into(message, (payload, scales))
    assert pack(payload, scales, 4).shape == message.shape
