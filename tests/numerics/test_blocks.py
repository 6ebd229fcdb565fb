"""Block scales against Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from fp8train.numerics.block_scales import (
    as_blocks,
    decode_e8m0,
    dequantize_blocks,
    from_blocks,
    quantize_blocks,
)
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.scale_blocks import block_size
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE

FORMATS = [pytest.param(E4M3, E4M3_TABLE, id="e4m3"), pytest.param(E5M2, E5M2_TABLE, id="e5m2")]


def test_block_is_the_largest_divisor_up_to_128() -> None:
    expected = {128: 128, 4096: 128, 192: 96, 576: 96, 100: 100, 1: 1, 320: 80, 131: 128, 262: 128}
    assert {length: block_size(length) for length in expected} == expected


@pytest.mark.parametrize("shape", [(6, 192), (3, 131), (5,), (2, 3, 256)])
def test_blocks_of_a_tensor_and_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    block = block_size(shape[-1])
    blocks = as_blocks(x, block)
    assert blocks.shape[-1] == block
    assert torch.equal(from_blocks(blocks, x.shape), x)
    assert torch.equal(blocks[0], torch.nn.functional.pad(x.reshape(-1, shape[-1])[0][:block], (0, 0)))


def test_every_e8m0_byte() -> None:
    values = decode_e8m0(torch.arange(256, dtype=torch.uint8)).tolist()
    assert math.isnan(values[255])
    assert values[1:255] == [2.0 ** (byte - 127) for byte in range(1, 255)]


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_payload_and_scale_follow_the_definition(fmt: Format, table: object, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(8, 32, generator=generator) * 10.0 ** torch.arange(-6, 10, 2)[:, None]
    x[3] = 0.0
    x[4, 0] = 448.0 * 4
    x[4, 1:] = 1.0
    x = x.to(dtype)
    payload, scales = quantize_blocks(x, fmt)
    for row in range(8):
        source = x[row].float().tolist()
        amax = max(map(abs, source))
        exponent = 0 if amax == 0 else math.ceil(math.log2(amax / fmt.max) - 1e-12)
        assert int(scales[row]) == exponent + 127
        expected = [table.encode(value * 2.0**-exponent) for value in source]  # type: ignore[attr-defined]
        codes = payload[row].view(torch.uint8).tolist()
        assert [c & 0xFF for c in codes] == expected
    exact = payload.double() * torch.exp2(scales.double() - 127)[:, None]
    assert torch.equal(dequantize_blocks(payload, scales).double(), exact)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_only_the_block_that_is_not_finite_becomes_nan(bad: float) -> None:
    x = torch.randn(4, 128)
    x[2, 77] = bad
    values = dequantize_blocks(*quantize_blocks(x, E4M3))
    assert torch.isnan(values[2]).all()
    assert torch.isfinite(values[[0, 1, 3]]).all()


def test_a_row_cut_at_a_block_boundary_has_the_codes_of_the_whole() -> None:
    x = torch.randn(16, 512)
    whole, scales = quantize_blocks(as_blocks(x, 128), E4M3)
    left, left_scales = quantize_blocks(as_blocks(x[:, :256], 128), E4M3)
    payload = from_blocks(whole, x.shape)[:, :256].contiguous().view(torch.uint8)
    assert torch.equal(payload, from_blocks(left, (16, 256)).view(torch.uint8))
    assert torch.equal(scales.view(16, 4)[:, :2].reshape(-1), left_scales)
