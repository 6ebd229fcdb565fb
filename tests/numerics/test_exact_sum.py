"""Sums of squares on an integer grid against Python's integers and fractions."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from fp8train.numerics.exact_sum import grid_square_sum, power_of_two_fp64, square_shift

INT64_MAX = 2**63 - 1
MICRO_BATCHES = 9362  # the most whose E4M3 codes fit INT32
CODE = 448 * 512
CASES = {  # dtype, bound on |x|
    "codes": (torch.int32, 8 * CODE),
    "many-codes": (torch.int32, MICRO_BATCHES * CODE),
    "fixed-point": (torch.int64, 8 * 2**40),
    "far-fixed-point": (torch.int64, 2**62),
}


def shift_of(numel: int, largest: int) -> int:
    return int(square_shift(torch.tensor(numel), torch.tensor(float(largest), dtype=torch.float64)))


def integers(dtype: torch.dtype, largest: int, numel: int, seed: int) -> torch.Tensor:
    """Ten binades of magnitudes up to ``largest``, both signs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(-10 * torch.rand(numel, generator=generator, dtype=torch.float64)) * (largest * 0.99)
    signs = torch.randint(0, 2, (numel,), generator=generator) * 2 - 1
    return (sizes * signs).to(dtype)


@pytest.mark.parametrize("case", CASES)
def test_any_split_in_any_order_gives_the_same_integer_and_it_is_close(case: str) -> None:
    dtype, largest = CASES[case]
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    generator = random.Random(seed)
    numel = 5000
    x = integers(dtype, largest, numel, seed)
    # The shift is that of the whole parameter, of which this may be a small part.
    for whole in (numel, 2**20, 2**34):
        shift = shift_of(whole, largest)
        total = int(grid_square_sum(x, shift))
        for _ in range(5):
            shuffled = x[torch.randperm(numel)]
            cuts = sorted(generator.choices(range(numel + 1), k=generator.randrange(1, 9)))
            parts = torch.tensor_split(shuffled, cuts)
            chunk = generator.randrange(1, 6000)
            sums = [grid_square_sum(part, torch.tensor(shift), chunk=chunk) for part in parts]
            assert int(torch.stack(sums).sum()) == total, (whole, cuts, chunk)
        true = sum(value * value for value in x.tolist())
        bound = Fraction(numel * 2**shift, 2) + Fraction(true, 2**51)
        assert abs(total * 2**shift - true) <= bound, whole


@pytest.mark.parametrize("numel", [1, 4097, 2**20, 2**36 + 1, 2**50])
@pytest.mark.parametrize("largest", [1, CODE, 8 * CODE, MICRO_BATCHES * CODE, 2**40, 2**53 + 1, 2**63 - 1])
def test_the_largest_possible_sum_fits_and_the_grid_is_no_coarser_than_needed(
    numel: int, largest: int
) -> None:
    shift = shift_of(numel, largest)
    whole = numel * largest**2
    assert whole < 2 ** (62 + shift)
    assert shift == 0 or whole > 2 ** (61 + shift) * (1 - Fraction(1, 2**49)), "one bit is given away"
    # All elements at the bound: by the code for one of them, by arithmetic for all.
    one = int(grid_square_sum(torch.tensor([-largest]), shift))
    assert abs(one * 2**shift - largest**2) <= Fraction(2**shift, 2) + Fraction(largest**2, 2**51)
    assert one * numel <= INT64_MAX


def test_a_full_tensor_of_extremes_does_not_wrap() -> None:
    numel, largest = 1 << 21, MICRO_BATCHES * CODE
    x = torch.full((numel,), -largest, dtype=torch.int32)
    shift = shift_of(numel, largest)
    got = int(grid_square_sum(x, shift)) * 2**shift
    assert got == pytest.approx(numel * largest**2, rel=2**-30)
    assert shift_of(1, 0) == 0
    assert int(grid_square_sum(torch.zeros(7, dtype=torch.int64), 0)) == 0
    assert int(grid_square_sum(torch.zeros(0, dtype=torch.int64), 3)) == 0


@pytest.mark.parametrize(("numel", "peak"), [(2**16, 2**13), (2**20, 2**11)])
def test_the_norm_of_an_ordinary_gradient_is_within_the_documented_error(numel: int, peak: int) -> None:
    """Normal values whose root mean square lies ``peak`` below what the grid must allow for."""
    r = 2**14
    x = (torch.randn(numel, generator=torch.Generator().manual_seed(1)) * r).to(torch.int32)
    shift = shift_of(numel, peak * r)
    assert shift > 0
    norm = math.sqrt(int(grid_square_sum(x, shift)) * 2**shift)
    true = math.sqrt(sum(value * value for value in x.tolist()))
    assert abs(norm / true - 1) <= 2**-20


def test_powers_of_two_are_exact_over_the_whole_range() -> None:
    exponents = list(range(-1022, 1024))
    assert power_of_two_fp64(torch.tensor(exponents)).tolist() == [math.ldexp(1.0, e) for e in exponents]
