"""The model of a tensor core's accumulator, against integers and the same rules in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fp8train.kernels.fast_accumulation import accumulate
from fp8train.kernels.gemm import emulation, fp8_gemm
from fp8train.numerics.cast import decode_finite

ONE = torch.ones(())


def codes(*shape: int, seed: int, spread: float = 1.0, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp2(
        spread * torch.randn(shape, generator=generator)
    )
    return values.clamp(-400, 400).to(dtype)


def in_fractions(a: list[float], b: list[float], bits: int, *, fast: bool) -> float:
    """One output by the rules of the module's docstring, in exact arithmetic."""
    total, accumulator = Fraction(0), Fraction(0)
    for start in range(0, len(a), 32):
        if not fast and start and start % 128 == 0:
            total = Fraction(float(torch.tensor(float(total + accumulator), dtype=torch.float32)))
            accumulator = Fraction(0)
        products = [
            Fraction(x) * Fraction(y)
            for x, y in zip(a[start : start + 32], b[start : start + 32], strict=True)
        ]
        largest = max(abs(number) for number in (*products, accumulator))
        if largest == 0:
            continue
        unit = Fraction(2) ** (math.frexp(float(largest))[1] - 1 - bits)
        accumulator = sum(math.trunc(number / unit) for number in (*products, accumulator)) * unit
        if accumulator:
            last = Fraction(2) ** (math.frexp(float(accumulator))[1] - 1 - bits)
            accumulator = math.trunc(accumulator / last) * last
    return float(torch.tensor(float(total + accumulator), dtype=torch.float32))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bits", [7, 13])
@pytest.mark.parametrize("k", [16, 96, 304])
def test_it_is_what_it_says(k: int, bits: int, fast: bool) -> None:
    a, b = codes(3, k, seed=1, spread=2.0), codes(k, 4, seed=2, spread=2.0, dtype=torch.float8_e5m2)
    found = accumulate(a, b, bits=bits, fast=fast)
    left, right = a.float().tolist(), b.float().t().tolist()
    expected = [[in_fractions(x, y, bits, fast=fast) for y in right] for x in left]
    assert found.tolist() == expected


def test_sums_that_fit_are_exact() -> None:
    """Integers up to 2^14 times a power of two."""
    a = torch.randint(-3, 4, (5, 256), generator=torch.Generator().manual_seed(3)).float()
    b = torch.randint(-3, 4, (256, 6), generator=torch.Generator().manual_seed(4)).float()
    for fast in (True, False):
        found = accumulate(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), fast=fast)
        assert torch.equal(found.double(), a.double() @ b.double())


def test_what_is_small_against_the_sum_is_lost_unless_it_is_promoted() -> None:
    """32 products of 256 make 2^13. Beside it a unit is 2^0 and products of 15/16 are lost one by one, all
    3168 of them; in an FP32 sum those after the first 128 elements count."""
    k = 32 + 31 * 32 + 32 * 68
    a, b = torch.full((1, k), 15 / 16), torch.ones(k, 1)
    a[0, :32], b[:32] = 16.0, 16.0
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    assert float(accumulate(a, b)) == 2**13
    assert float(accumulate(a, b, fast=False)) == 2**13 + (k - 128) * 15 / 16
    assert float(a.double() @ b.double()) == 2**13 + (k - 32) * 15 / 16


@pytest.mark.parametrize("k", [512, 4096])
def test_the_error_is_bounded_and_promotion_lowers_it(k: int) -> None:
    """A step truncates 33 numbers by less than a unit each, relative to the largest among them."""
    a, b = codes(16, k, seed=5), codes(k, 16, seed=6)
    exact = a.double() @ b.double()
    largest = (a.double().abs() @ b.double().abs()).max()
    errors = [(accumulate(a, b, fast=fast).double() - exact).norm() / exact.norm() for fast in (True, False)]
    assert errors[1] < errors[0]
    assert (accumulate(a, b).double() - exact).abs().max() < k / 32 * 33 * largest * 2.0**-13
    assert (accumulate(a, b, bits=17).double() - exact).norm() < (accumulate(a, b).double() - exact).norm()


def test_as_a_gemm_it_takes_scales_and_leaves_others_alone() -> None:
    a, b = codes(16, 64, seed=7), codes(64, 32, seed=8)
    scale_a, scale_b = torch.tensor(0.25), torch.tensor(2.0)
    settings = {"power_of_two": True, "out_dtype": torch.float32, "backend": emulation().name}
    found = fp8_gemm(a, b, scale_a, scale_b, alpha=3.0, fast_accumulation=True, **settings)
    assert torch.equal(found, accumulate(a, b) * 1.5)
    exact = fp8_gemm(a, b, scale_a, scale_b, alpha=3.0, **settings)
    decoded = (decode_finite(x, torch.float64) for x in (a, b))
    left, right = decoded
    torch.testing.assert_close(exact.double(), 1.5 * (left @ right), rtol=1e-6, atol=1e-6)
