"""Casts against an independent table of all codes."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8train.numerics.cast import amax_of, cast, decode_finite, quantize, uncast
from fp8train.numerics.formats import dtype_of, format_of
from fp8train.precision.number_formats import E4M3, E5M2, Format, format_by_name
from fp8train.precision.operand_cast import QuantSpec
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE, Table

FORMATS = [pytest.param(E4M3, E4M3_TABLE, id="e4m3"), pytest.param(E5M2, E5M2_TABLE, id="e5m2")]
SOURCES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ONE = torch.tensor(1.0)


def codes(payload: Tensor) -> list[int]:
    return payload.view(torch.uint8).flatten().tolist()


def all_codes(fmt: Format) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype_of(fmt))


def is_nan_code(table: Table, code: int) -> bool:
    return math.isnan(table.decode(code))


def probes(table: Table) -> list[float]:
    """Every value, every tie and its FP32 neighbours, the ends of the range, both signs."""
    values = table.positive
    ties = [(a + b) / 2 for a, b in pairwise(values)]
    beyond = [values[-1] + (values[-1] - values[-2]) / 2, values[-1] * 1.25, 3.0e38, math.inf]
    inside = []
    for value in np.array(values + ties + beyond, dtype=np.float32):
        with np.errstate(over="ignore"):
            inside += [value, np.nextafter(value, np.float32(0)), np.nextafter(value, np.float32(np.inf))]
    smallest = [1e-45, 1e-38, values[1] / 4]
    positive = [float(value) for value in inside] + smallest
    return positive + [-value for value in positive]


def test_formats_are_described_by_their_definition() -> None:
    for fmt, table in ((E4M3, E4M3_TABLE), (E5M2, E5M2_TABLE)):
        values = table.positive
        assert fmt.max == table.max
        assert 2.0 ** (1 - fmt.bias - fmt.mantissa_bits) == values[1]
        assert 2.0 ** (1 - fmt.bias) == values[2**fmt.mantissa_bits]
        assert fmt.max_exponent == math.frexp(table.max)[1] - 1
        assert fmt.exponent_bits + fmt.mantissa_bits == 7
        assert fmt.max == 1.75 * 2.0**fmt.max_exponent  # the scale rule relies on it
        assert format_by_name(fmt.name) is fmt
        assert format_of(dtype_of(fmt)) is fmt
    with pytest.raises(ValueError, match="unknown FP8 format 'e3m4'; legal: e4m3, e5m2"):
        format_by_name("e3m4")
    with pytest.raises(ValueError, match=r"torch\.bfloat16 is not an FP8 type"):
        format_of(torch.bfloat16)


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_uncast_of_every_code(fmt: Format, table: Table, dtype: torch.dtype) -> None:
    """All 256 codes, NaN, infinities and both zeros included, are exact in every wider type."""
    decoded = uncast(all_codes(fmt), ONE, dtype)
    assert decoded.dtype == dtype
    for code, value in enumerate(decoded.tolist()):
        expected = table.decode(code)
        if math.isnan(expected):
            assert math.isnan(value), code
        else:
            assert value == expected, code
            assert math.copysign(1, value) == math.copysign(1, expected), code


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("exponent", [-126, -40, -1, 3, 40, 111])
def test_uncast_with_a_scale(fmt: Format, table: Table, exponent: int) -> None:
    scale_inv = torch.tensor(2.0**exponent)
    in_fp64 = uncast(all_codes(fmt), scale_inv, torch.float64).tolist()
    in_fp32 = uncast(all_codes(fmt), scale_inv).tolist()
    for code in range(256):
        if is_nan_code(table, code):
            assert math.isnan(in_fp64[code])
            assert math.isnan(in_fp32[code])
        else:
            assert in_fp64[code] == table.decode(code) * 2.0**exponent
            assert in_fp32[code] == float(np.float32(table.decode(code) * 2.0**exponent))


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decode_finite_of_every_finite_code(fmt: Format, table: Table, dtype: torch.dtype) -> None:
    finite = [code for code in range(256) if math.isfinite(table.decode(code))]
    payload = torch.tensor(finite, dtype=torch.uint8).view(dtype_of(fmt))
    decoded = decode_finite(payload, dtype)
    assert decoded.dtype == dtype
    expected = torch.tensor([table.decode(code) for code in finite], dtype=torch.float64)
    assert torch.equal(decoded.double(), expected)
    assert torch.equal(torch.signbit(decoded), torch.signbit(expected))
    matrix = payload[: 16 * 15].view(16, 15)
    assert torch.equal(decode_finite(matrix.t(), dtype).double(), expected[: 16 * 15].view(16, 15).t())


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
def test_cast_rounds_to_nearest_even_and_clamps(fmt: Format, table: Table, dtype: torch.dtype) -> None:
    source = torch.tensor(probes(table), dtype=torch.float64).to(dtype)
    assert len(set(source.tolist())) > 250  # the probes are distinct numbers in this type too
    expected = [table.encode(value) for value in source.tolist()]
    assert codes(cast(source, fmt, ONE)) == expected
    assert codes(cast(source, fmt, ONE, scale_is_power_of_two=True)) == expected


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
def test_ties_and_their_fp32_neighbours(fmt: Format, table: Table) -> None:
    """Spelt out: a tie goes to the even code, one FP32 ulp away to the nearer one."""
    values = table.positive
    for lower in range(len(values) - 1):
        tie = np.float32((values[lower] + values[lower + 1]) / 2)
        around = [np.nextafter(tie, np.float32(0)), tie, np.nextafter(tie, np.float32(np.inf))]
        even = lower if lower % 2 == 0 else lower + 1
        assert codes(cast(torch.tensor(np.array(around)), fmt, ONE)) == [lower, even, lower + 1], lower


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
def test_cast_of_special_values(fmt: Format, table: Table, dtype: torch.dtype) -> None:
    largest = len(table.positive) - 1
    source = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan], dtype=dtype)
    for pow2 in (False, True):
        got = codes(cast(source, fmt, ONE, scale_is_power_of_two=pow2))
        assert got[:4] == [0x00, 0x80, largest, 0x80 | largest]
        assert all(is_nan_code(table, code) for code in got[4:])


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
def test_fp64_rounds_to_fp32_first(fmt: Format, table: Table) -> None:
    """Just above a tie in FP64, on it in FP32: the even code."""
    values = table.positive
    tie = (values[8] + values[9]) / 2
    source = torch.tensor([tie * (1 + 2.0**-40), tie * (1 + 2.0**-20)], dtype=torch.float64)
    assert codes(cast(source, fmt, ONE)) == [8, 9]
    assert table.encode(float(source[0])) == 9  # rounding once from FP64 would differ


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
def test_fp32_bit_patterns_at_random(fmt: Format, table: Table) -> None:
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (8_000,), generator=generator, dtype=torch.int64)
    source = bits.to(torch.int32).view(torch.float32)
    near = torch.randn(8_000, generator=generator) * torch.exp2(torch.randn(8_000, generator=generator) * 6)
    source = torch.cat([source[~source.isnan()], near])
    assert codes(cast(source, fmt, ONE)) == [table.encode(value) for value in source.tolist()]


def every_bf16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("exponents", [range(-126, -60, 7), range(-24, 25), range(60, 127, 7), (-126, 126)])
def test_bf16_fast_path_for_every_bit_pattern(fmt: Format, table: Table, exponents: range) -> None:
    """A BF16 product by 2^k is exact unless it leaves the normal range: below, FP8 has only zero (half of its
    smallest value is 2^-10 or 2^-17, BF16's smallest normal 2^-126); above, it clamps. So the codes never
    differ."""
    source = every_bf16()
    nan = source.isnan()
    for exponent in exponents:
        scale = torch.tensor(2.0**exponent)
        fast = cast(source, fmt, scale, scale_is_power_of_two=True).view(torch.uint8)
        slow = cast(source.float(), fmt, scale).view(torch.uint8)
        assert torch.equal(fast[~nan], slow[~nan]), exponent
        assert all(
            is_nan_code(table, code) for code in fast[nan].unique().tolist() + slow[nan].unique().tolist()
        )


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
def test_every_bf16_against_the_table(fmt: Format, table: Table) -> None:
    source = every_bf16()
    source = source[~source.isnan()][::7]
    assert codes(cast(source, fmt, ONE, scale_is_power_of_two=True)) == [
        table.encode(v) for v in source.tolist()
    ]


def test_cast_takes_broadcastable_scales() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]])
    for source in (x, x.bfloat16()):
        rows = torch.stack(
            [cast(row, E4M3, s[0], scale_is_power_of_two=True) for row, s in zip(source, scale, strict=True)]
        )
        whole = cast(source, E4M3, scale, scale_is_power_of_two=True)
        assert torch.equal(whole.view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.parametrize("dtype", SOURCES)
def test_amax(dtype: torch.dtype) -> None:
    def of(*values: float) -> float:
        amax = amax_of(torch.tensor(values, dtype=dtype))
        assert amax.dtype == torch.float32
        assert amax.shape == ()
        return float(amax)

    assert of(1.0, -3.0, 2.0) == 3.0
    assert of(-1.0, 2.5) == 2.5
    assert of(math.inf, 1.0) == math.inf
    assert of(-math.inf, 1.0) == math.inf
    assert math.isnan(of(1.0, math.nan, math.inf))
    assert of() == 0
    for zeros in ((0.0,), (-0.0,), (0.0, -0.0), (0.0,) * 64, (-0.0,) * 64):
        assert math.copysign(1.0, of(*zeros)) == 1.0  # +0: its bits are what the scale rule reads


@pytest.mark.parametrize(("fmt", "table"), FORMATS)
@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_quantize(fmt: Format, table: Table, dtype: torch.dtype, power_of_two: bool, size: float) -> None:
    x = (torch.randn(50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * size / 4).to(
        dtype
    )
    payload, scale_inv = quantize(x, QuantSpec(fmt, power_of_two=power_of_two))
    amax = np.float32(x.float().abs().max().item())
    if power_of_two:
        exponent = max(k for k in range(-126, 127) if float(amax) * 2.0**k <= table.max)
        scale = np.float32(2.0**exponent)
        assert float(scale_inv) == 2.0**-exponent
    else:
        scale = np.float32(table.max) / amax
        assert float(scale_inv) == float(np.float32(1) / scale)
    scaled = x.float().numpy() * scale
    assert payload.dtype == dtype_of(fmt)
    assert scale_inv.dtype == torch.float32
    assert codes(payload) == [table.encode(float(value)) for value in scaled.flatten()]
    assert (
        int((payload.view(torch.uint8) & 0x7F).max()) >= table.encode(table.max / 2) - 1
    )  # the range is used


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_quantize_edge_sources(fmt: Format) -> None:
    for zeros in (torch.zeros(5, 3), -torch.zeros(5, 3), torch.zeros(0, 3)):
        payload, scale_inv = quantize(zeros, QuantSpec(fmt))
        assert float(scale_inv) == 1.0
        assert not (payload.view(torch.uint8) & 0x7F).any()
    for value in (math.inf, -math.inf, math.nan):
        for dtype in SOURCES:
            x = torch.ones(4, dtype=dtype)
            x[2] = value
            payload, scale_inv = quantize(x, QuantSpec(fmt))
            assert math.isnan(float(scale_inv))
            assert uncast(payload, scale_inv).isnan().all()  # the source was not finite: nor is the result
    payload, scale_inv = quantize(torch.tensor([1e39, 1.0], dtype=torch.float64), QuantSpec(fmt))
    assert math.isnan(float(scale_inv))  # FP64 rounds to FP32 first, where this is infinite
    for largest, decoded in ((1.75 * 2.0**127, 1.75 * 2.0**127), (torch.finfo(torch.float32).max, 2.0**128)):
        payload, scale_inv = quantize(torch.tensor([largest, -1.0]), QuantSpec(fmt))
        assert float(uncast(payload, scale_inv, torch.float64)[0]) == decoded
        # The second rounds up to 2^128, infinite in FP32 as it is in BF16.
        assert float(uncast(payload, scale_inv)[0]) == (decoded if decoded < 2.0**128 else math.inf)
