"""Device functions against torch's casts and the package's definitions: every code, and every BF16 number."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu import codes
from fp8train.numerics import block_scales, scale, stochastic
from fp8train.numerics.cast import cast, decode_finite
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, FP16, Format
from tests.kernels.gpu.same import same

ONE = torch.ones(())


@triton.jit
def _encode(x, out, n, MANTISSA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, codes.encode_fp8(values, MANTISSA, False), mask=at < n)


@triton.jit
def _decode(code, out, MANTISSA: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, codes.decode_fp8(tl.load(code + at), MANTISSA))


@triton.jit
def _scales(amax, exponent, byte, back, n, MAX_EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(amax + at, mask=at < n, other=0.0)
    finite = codes.is_finite(values)
    k = codes.exponent_from_amax(tl.where(finite, values, 0.0), MAX_EXPONENT)
    tl.store(exponent + at, codes.pow2(k), mask=at < n)
    encoded = codes.encode_e8m0(-k, finite)
    tl.store(byte + at, encoded, mask=at < n)
    tl.store(back + at, codes.decode_e8m0(encoded), mask=at < n)


@triton.jit
def _stochastic(x, out, key, start, n, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = codes.random_bits(key, at + start)
    values = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, codes.round_stochastic(values, bits, MANTISSA, LOWEST), mask=at < n)


def every_bf16() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def around_ties(fmt: Format) -> Tensor:
    """Half-way points between neighbours of the format, and FP32's neighbours of those."""
    value = torch.arange(256, dtype=torch.uint8).view(dtype_of(fmt)).double()
    value = value[value.isfinite()].unique()
    tie = ((value[1:] + value[:-1]) / 2).float()
    return torch.cat((tie, tie.nextafter(tie - 1), tie.nextafter(tie + 1), value.float()))


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_encoding_is_torchs_cast(fmt: Format) -> None:
    x = torch.cat((every_bf16(), around_ties(fmt)))
    out = torch.empty(len(x), dtype=torch.uint8)
    _encode[(triton.cdiv(len(x), 8192),)](x, out, len(x), MANTISSA=fmt.mantissa_bits, BLOCK=8192)
    assert torch.equal(out, cast(x, fmt, ONE).view(torch.uint8))


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_decoding_every_code(fmt: Format) -> None:
    code, out = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    _decode[(1,)](code, out, MANTISSA=fmt.mantissa_bits)
    assert torch.equal(out, decode_finite(code.view(dtype_of(fmt)), torch.float32))
    true = code.view(dtype_of(fmt)).double()
    assert torch.equal(out.double()[true.isfinite()], true[true.isfinite()])


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16])
def test_scales_of_every_bf16_amax(fmt: Format) -> None:
    amax = every_bf16().abs()
    exponent, byte = torch.empty(len(amax)), torch.empty(len(amax), dtype=torch.uint8)
    back = torch.empty(len(amax))
    grid = (triton.cdiv(len(amax), 8192),)
    _scales[grid](amax, exponent, byte, back, len(amax), MAX_EXPONENT=fmt.max_exponent, BLOCK=8192)
    finite = amax.isfinite()
    k = scale.exponent_from_amax(torch.where(finite, amax, 0.0), max_exponent=fmt.max_exponent)
    assert torch.equal(exponent, scale.power_of_two(k))
    assert torch.equal(byte, block_scales.encode_e8m0(-k, finite))
    assert torch.equal(back.nan_to_num(-1.0), block_scales.decode_e8m0(byte).nan_to_num(-1.0))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16])
def test_stochastic_rounding_draws_the_same_bits(fmt: Format) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** (2 - fmt.bias)
    x[:3] = torch.tensor([0.0, torch.nan, torch.inf])
    key, start, out = stochastic.stream_key(1, 2, "w"), (1 << 32) - 5000, torch.empty_like(x)
    _stochastic[(3,)](x, out, key, start, len(x), fmt.mantissa_bits, 1 - fmt.bias, BLOCK=8192)
    bits = stochastic.random_bits(key, start, len(x), x.device)
    expected = stochastic.round_stochastic(x, fmt.mantissa_bits, 1 - fmt.bias, bits)
    assert torch.equal(out.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    assert len(out.unique()) > 30


@triton.jit
def _bf16(x, wide, out, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    values = codes.widen(tl.load(x + at), False)
    tl.store(wide + at, values)
    tl.store(out + at, codes.narrow(values * 1.0000001, False))


def test_bf16_numbers_widen_exactly_and_round_to_nearest() -> None:
    x = every_bf16().bfloat16()
    wide, out = torch.empty(1 << 16), torch.empty_like(x)
    _bf16[(16,)](x, wide, out, WIDTH=4096)
    assert same(wide, x.float())
    assert same(out, (x.float() * torch.tensor(1.0000001)).bfloat16())
    ties = (every_bf16().view(torch.int32) | 0x8000).view(torch.float32)
    _bf16[(16,)](ties, wide, out, WIDTH=4096)
    assert same(wide, ties)
    assert same(out, (ties * torch.tensor(1.0000001)).bfloat16())
