"""The launchers of block casts and of norms of blocks against the package's casts, to the bit, and FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import block_cast
from fp8train.kernels.block_cast import cast_blocks, count_of_partials
from fp8train.numerics.block_scales import as_blocks, dequantize_blocks, quantize_blocks
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, Format
from tests.kernels.gpu.same import same

SHAPES = [(3, 128, 128), (40, 96, 96), (5, 256, 64), (7, 135, 128), (70, 37, 32), (0, 64, 64)]
"""(rows, columns, block)."""


def source(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return (x * torch.exp2(torch.arange(rows)[:, None] % 40 - 20.0)).to(dtype)


def empty(blocks: int, block: int, fmt: Format) -> tuple[Tensor, Tensor]:
    codes = torch.full((blocks, block), 77, dtype=torch.uint8)
    return codes.view(dtype_of(fmt)), torch.full((blocks,), 77, dtype=torch.uint8)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_codes_and_scales(rows: int, columns: int, block: int, dtype: torch.dtype, fmt: Format) -> None:
    x = source(rows, columns, dtype)
    expected = quantize_blocks(as_blocks(x, block), fmt)
    payload, scales = empty(*expected[0].shape, fmt)
    block_cast._cast_op.launch(
        x, None, None, payload.view(torch.uint8), scales, None, None, fmt.mantissa_bits
    )
    for ours, reference, theirs in zip((payload, scales), cast_blocks(x, block, fmt), expected, strict=True):
        assert same(ours, theirs)
        assert same(reference, theirs)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_special_blocks(dtype: torch.dtype, fmt: Format) -> None:
    x = source(9, 32, dtype)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 2.0**-133, 3e38)):
        x[row, row] = value
        if abs(value) < 1:
            x[row] = value
    payload, scales = empty(9, 32, fmt)
    block_cast._cast_op.launch(
        x, None, None, payload.view(torch.uint8), scales, None, None, fmt.mantissa_bits
    )
    expected = quantize_blocks(x, fmt)
    assert same(payload, expected[0])
    assert same(scales, expected[1])
    assert scales[:3].tolist() == [255] * 3
    squares = block_cast._squares_op.launch(payload, scales, torch.arange(1, 10))
    assert squares.sum(1).isnan().tolist() == [True] * 3 + [False] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_error_feedback_and_squares_in_the_same_pass(dtype: torch.dtype) -> None:
    x, block = source(70, 96, dtype), 96
    residual = (0.01 * source(70, 96, torch.float32)).bfloat16()
    ends = torch.tensor([11, 11, 64, 70])
    results = []
    for call in (block_cast._cast_op.launch, block_cast._cast_op):
        payload, scales = empty(70, block, E4M3)
        lost = torch.full((70, block), 9.0, dtype=torch.bfloat16)
        squares = torch.full((4, count_of_partials(70, block)), torch.nan, dtype=torch.float64)
        call(x, residual, ends, payload.view(torch.uint8), scales, lost, squares, 3)
        results.append((payload, scales, lost, squares))
    for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
        assert same(ours, theirs)
    payload, scales, lost, squares = results[0]
    wide = payload.double() * torch.exp2(scales.double() - 127)[:, None]
    assert same(lost, ((x.float() + residual) - wide.float()).bfloat16())
    stops = ends.tolist()
    for segment, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True)):
        exact = wide[start:stop].square().sum()
        for found in (squares, results[1][3], block_cast._squares_op.launch(payload, scales, ends)):
            torch.testing.assert_close(found[segment].sum(), exact, rtol=1e-14, atol=0)
    assert squares[1].tolist() == [0.0] * squares.shape[1]  # a segment without blocks


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("blocks", "block"), [(1, 32), (100, 128), (90, 96), (0, 64)])
def test_squares_of_stored_codes(blocks: int, block: int, fmt: Format) -> None:
    payload, scales = quantize_blocks(source(blocks, block, torch.float32), fmt)
    squares = block_cast._squares_op.launch(payload, scales, None)
    fake = block_cast._squares_of_blocks_fake(payload, scales, None)
    assert squares.shape == fake.shape and squares.dtype == fake.dtype
    exact = dequantize_blocks(payload, scales, torch.float64).square().sum()
    for found in (squares, block_cast.squares_of_blocks(payload, scales)):
        torch.testing.assert_close(found.sum(), exact, rtol=1e-14, atol=0)


def test_without_memory() -> None:
    payload, scales = cast_blocks(torch.empty(6, 300, dtype=torch.bfloat16, device="meta"), 128, E5M2)
    assert payload.shape == (18, 128) and payload.dtype == torch.float8_e5m2
    assert block_cast.squares_of_blocks(payload, scales).shape == (1, 1)
