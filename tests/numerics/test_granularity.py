"""Scales of rows and blocks against loops in Python and NumPy that know nothing of fp8train.

The reference walks over what shares a scale as the module's table words it, takes the largest magnitude,
finds the scale by search (powers of two) or one division, and encodes every element with the table of
``fp8_table``.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8train.numerics.cast import quantize, uncast
from fp8train.numerics.granularity import expand_scales
from fp8train.numerics.statistics import FIELDS, cast_statistics
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import scale_tile
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE

DIRECTED = ("row", "block_1x128", "mx_1x32")
GRANULARITIES = (*DIRECTED, "block_128x128")
TABLES = {E4M3: E4M3_TABLE, E5M2: E5M2_TABLE}
SHAPES = [(3, 5), (40, 130), (130, 40), (16, 256), (1, 300), (129, 1)]
"""Ragged last blocks in either dimension, single rows and columns."""


def groups(rows: int, columns: int, granularity: str, contracted: int) -> list[tuple[slice, slice]]:
    """What shares a scale, as index ranges."""
    if granularity == "block_128x128":
        tile = (128, 128)
    else:
        along = {"row": 10**9, "block_1x128": 128, "mx_1x32": 32}[granularity]
        tile = (1, along) if contracted == 1 else (along, 1)
    return [
        (slice(i, i + tile[0]), slice(j, j + tile[1]))
        for i in range(0, rows, tile[0])
        for j in range(0, columns, tile[1])
    ]


def reference_scale(amax: float, largest: float, power_of_two: bool) -> float:
    """The largest power of two that keeps ``amax`` within ``largest``, or the quotient in FP32."""
    if amax == 0:
        return 1.0
    if not power_of_two:
        return float(np.float32(largest) / np.float32(amax))
    k = -126
    while k < 126 and math.ldexp(amax, k + 1) <= largest:
        k += 1
    return math.ldexp(1.0, k)


def reference(x: np.ndarray, spec: QuantSpec, contracted: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8, values float64): elementwise, for finite x."""
    table = TABLES[spec.format]
    codes, values = np.zeros(x.shape, np.uint8), np.zeros(x.shape)
    for where in groups(*x.shape, spec.granularity, contracted):
        part = x[where]
        scale = reference_scale(float(np.abs(part).max()), table.max, spec.power_of_two)
        scaled = (part.astype(np.float32) * np.float32(scale)).astype(np.float64)
        encoded = np.vectorize(table.encode)(scaled)
        codes[where] = encoded
        values[where] = np.vectorize(table.decode)(encoded) / scale
    return codes, values


def source(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Magnitudes over 2^±20 that differ from row to row and column to column; zeros; a zero row
    and column."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-10, 10, (rows, 1), generator=generator).double())
    x *= torch.exp2(torch.randint(-10, 10, (1, columns), generator=generator).double())
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    if rows > 2 and columns > 2:
        x[1], x[:, 2] = 0, 0
    return x.to(dtype)


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_codes_and_values_equal_the_reference(granularity: str, fmt: Format, contracted: int) -> None:
    for dtype, shape in zip([torch.bfloat16, torch.float32, torch.float64] * 2, SHAPES, strict=True):
        for power_of_two in (True, False) if granularity != "mx_1x32" else (True,):
            spec = QuantSpec(fmt, granularity=granularity, power_of_two=power_of_two)
            x = source(*shape, dtype)
            payload, scale_inv = quantize(x, spec, contracted=contracted)
            codes, values = reference(x.float().double().numpy(), spec, contracted)
            assert np.array_equal(payload.view(torch.uint8).numpy(), codes), (dtype, shape, power_of_two)
            got = (payload.double() * expand_scales(scale_inv, x.shape).double()).numpy()
            slack = 0 if power_of_two else 2.0**-23
            assert np.allclose(got, values, rtol=slack, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_transposing_operand_and_direction_transposes_the_result(granularity: str) -> None:
    spec = QuantSpec(E4M3, granularity=granularity)
    x = source(70, 200, torch.bfloat16)
    payload, scale_inv = quantize(x, spec, contracted=1)
    other, other_inv = quantize(x.t(), spec, contracted=0)
    assert torch.equal(payload.view(torch.uint8), other.t().view(torch.uint8))
    assert torch.equal(scale_inv, other_inv.t())


def test_shapes_of_scales() -> None:
    x = torch.ones(130, 300)
    for granularity, along, across in (
        ("row", (130, 1), (1, 300)),
        ("block_1x128", (130, 3), (2, 300)),
        ("mx_1x32", (130, 10), (5, 300)),
        ("block_128x128", (2, 3), (2, 3)),
    ):
        spec = QuantSpec(E4M3, granularity=granularity)
        assert quantize(x, spec, contracted=1)[1].shape == along
        assert quantize(x, spec, contracted=0)[1].shape == across


def test_every_shape_tells_what_its_scales_cover() -> None:
    """For each size the scale of an element, found through shapes alone, is that of its own tile."""
    for size in range(1, 300):
        for block in (1, 32, 128):
            count = -(-size // block)
            scales = torch.arange(count).float()[:, None]
            expected = torch.arange(size)[:, None] // block
            got = expand_scales(scales, (size, 1)).expand(size, 1)
            assert torch.equal(got, expected.float()), (size, block)


def round_trip(x: Tensor, spec: QuantSpec) -> Tensor:
    payload, scale_inv = quantize(x, spec)
    return uncast(payload, expand_scales(scale_inv, x.shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_non_finite_element_spoils_what_shares_its_scale_and_nothing_else(
    granularity: str, bad: float
) -> None:
    x = source(140, 290, torch.float32)
    spec = QuantSpec(E4M3, granularity=granularity)
    clean = round_trip(x, spec)
    x[135, 280] = bad
    got = round_trip(x, spec)
    spoilt = torch.zeros(140, 290, dtype=torch.bool)
    [tile] = [
        where
        for where in groups(140, 290, granularity, 1)
        if where[0].start <= 135 < where[0].stop and where[1].start <= 280 < where[1].stop
    ]
    spoilt[tile] = True
    assert torch.isnan(got[spoilt]).all()
    assert torch.equal(got[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rounding_scales_down_never_saturates(granularity: str) -> None:
    """Mantissas just below, at and above 1.75 · 2^k: the scaled amax is within the format and above its half;
    so E8M0 rounded up does not saturate either."""
    values = [1.75 * (1 + step * 2.0**-8) * 2.0**k for k in range(-40, 40, 7) for step in (-2, -1, 0, 1, 2)]
    x = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 256).clone().float()
    if granularity == "block_128x128":
        x = x[:1].expand(256, 256).clone()
    scale_inv = quantize(x, QuantSpec(E4M3, granularity=granularity))[1]
    scaled = x.double() / expand_scales(scale_inv, x.shape).double()
    assert scaled.max() <= 448
    assert scaled.min() > 224
    mantissa, exponent = torch.frexp(expand_scales(scale_inv, x.shape).expand(x.shape))
    assert (mantissa == 0.5).all()  # powers of two
    assert torch.equal((exponent - 1).double(), torch.ceil(torch.log2(x.double() / 448)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_element_is_quantised_worse_than_with_one_scale(granularity: str) -> None:
    x = source(256, 256, torch.float32)
    x[:128, :128] *= 2.0**-30
    one = round_trip(x, QuantSpec(E4M3))
    many = round_trip(x, QuantSpec(E4M3, granularity=granularity))
    assert ((many - x).abs() <= (one - x).abs()).all()
    assert (many == 0).sum() < (one == 0).sum()  # fewer values flushed


def test_statistics_of_broadcast_scales() -> None:
    x = torch.tensor([[448.0, 1.0], [448.0 * 4, 2.0**-9]])
    payload, scale_inv = quantize(x, QuantSpec(E4M3, granularity="row"))
    assert scale_inv.tolist() == [[1.0], [4.0]]
    row = dict(zip(FIELDS, cast_statistics(x, payload, scale_inv).tolist(), strict=True))
    assert row["log2_scale"] == -1.0  # the mean of 0 and -2
    assert row["flushed"] == 0.25  # 2^-9 / 4 is below half of the smallest subnormal
    assert row["saturated"] == 0


def test_tiles() -> None:
    assert scale_tile("tensor", 1) == (None, None)
    assert scale_tile("row", 0) == (None, 1)
    assert scale_tile("mx_1x32", 1) == (1, 32)
    assert scale_tile("block_128x128", 0) == (128, 128)


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiled_casts_have_the_same_codes(granularity: str, contracted: int) -> None:
    """With short last blocks too, which torch 2.13 gets wrong if it is left to compile the repetition."""
    spec = QuantSpec(E4M3, granularity=granularity)
    x = source(40, 304, torch.float32).add(1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: quantize(t, spec, contracted=contracted), fullgraph=True, dynamic=False
    )
    for got, expected in zip(compiled(x), quantize(x, spec, contracted=contracted), strict=True):
        assert torch.equal(got.float(), expected.float())
