"""The simulation of NVFP4 against tables written here and a second implementation in FP64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fp8train.numerics.nvfp4 import block_bits, hadamard, quantize_nvfp4, round_e2m1
from fp8train.numerics.stochastic import random_bits, stream_key

CPU = torch.device("cpu")
# Codes 0 to 7 of OCP MX 1.0, table 4; with the sign bit their negatives.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# All finite positive E4M3 numbers: 3 bits of mantissa, bias 7, subnormals of 2^-9; 480 would be NaN.
E4M3 = [k * 2.0**-9 for k in range(8)]
E4M3 += [(8 + k) * 2.0 ** (e - 10) for e in range(1, 16) for k in range(8) if (e, k) != (15, 7)]


def nearest(value: float, table: list[float]) -> float:
    """The entry next to a value that is not negative; of two, that with the even code."""
    return min(enumerate(table), key=lambda entry: (abs(entry[1] - value), entry[0] % 2))[1]


def test_all_codes_their_middles_and_everything_between() -> None:
    for code, value in enumerate(E2M1):
        assert float(round_e2m1(torch.tensor(value))) == value, code
        assert float(round_e2m1(torch.tensor(-value))) == -value, code
    assert math.copysign(1.0, float(round_e2m1(torch.tensor(-0.0)))) == -1.0
    middles = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    for middle, even in middles.items():
        below, above = (float(torch.nextafter(torch.tensor(middle), torch.tensor(to))) for to in (0.0, 9.0))
        lower = max(value for value in E2M1 if value < middle)
        upper = min(value for value in E2M1 if value > middle)
        found = round_e2m1(torch.tensor([below, middle, above, -below, -middle, -above]))
        assert found.tolist() == [lower, even, upper, -lower, -even, -upper], middle
    grid = torch.arange(-800, 801) / 64
    expected = [math.copysign(nearest(abs(x), E2M1), x) for x in grid.tolist()]
    assert round_e2m1(grid).tolist() == expected
    assert round_e2m1(torch.tensor([6.5, 1e30, math.inf, -math.inf])).tolist() == [6.0, 6.0, 6.0, -6.0]
    assert torch.isnan(round_e2m1(torch.tensor(math.nan)))


def test_stochastic_rounding_takes_the_neighbours_in_proportion() -> None:
    both = E2M1 + [-value for value in E2M1]
    count = 20000
    bits = random_bits(stream_key(1, 1, "x"), 0, count, CPU)
    for x in (0.0, 0.1, 0.4, 0.5, 0.8, 1.3, 1.9, 2.6, 3.0, 3.9, 4.5, 5.9, 6.0, -0.3, -5.0):
        found = round_e2m1(torch.full((count,), x), bits)
        neighbours = {max(v for v in both if v <= x), min(v for v in both if v >= x)}
        assert set(found.tolist()) <= neighbours
        width = max(neighbours) - min(neighbours)
        assert float(found.double().mean()) == pytest.approx(x, abs=4 * width / 2 / count**0.5)


def reference(x: Tensor, *, contracted: int, square: bool) -> tuple[Tensor, float, Tensor]:
    """(values, 1 / S, distance of the closest tie in units of the code) from the formulas, FP64."""
    matrix = x.double() if contracted == 1 else x.double().t()
    scale = 448 * 6 / float(x.abs().max())
    values, distance = torch.zeros_like(matrix), torch.full_like(matrix, math.inf)
    high = 16 if square else 1
    for i in range(0, matrix.shape[0], high):
        for j in range(0, matrix.shape[1], 16):
            rows, columns = (i, min(i + high, matrix.shape[0])), (j, min(j + 16, matrix.shape[1]))
            wanted = float(matrix[slice(*rows), slice(*columns)].abs().max()) / 6 * scale
            block = nearest(min(wanted, 448.0), E4M3)
            for at in [(p, q) for p in range(*rows) for q in range(*columns)]:
                element = float(matrix[at])
                code = min(abs(element) * scale / block, 6.0) if block else 0.0
                values[at] = math.copysign(nearest(code, E2M1) * block / scale, element)
                middles = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
                distance[at] = min(abs(code - middle) for middle in middles)
    return (values, 1 / scale, distance) if contracted == 1 else (values.t(), 1 / scale, distance.t())


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (5, 20), (17, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_follow_the_formulas(
    contracted: int, square: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(11)
    x = (
        torch.randn(shape, generator=generator)
        * torch.exp(2 * torch.randn(shape, generator=generator))
        * 1e-4
    )
    x[0, 0] = 0.0
    payload, scale_inv = quantize_nvfp4(
        x, x.abs().max(), dtype, contracted=contracted, square=square, stochastic=False
    )
    expected, inverse, distance = reference(x, contracted=contracted, square=square)
    assert payload.dtype == dtype
    assert payload.shape == x.shape
    assert float(scale_inv) == pytest.approx(inverse, rel=1e-6)
    sure = distance > 1e-4
    assert float(sure.float().mean()) > 0.98
    error = (payload.double() * float(scale_inv) - expected).abs()[sure]
    assert float(error.max()) <= 1e-6 * float(x.abs().max())
    # Every payload is a product of the two tables, whatever type holds it.
    products = {q * s for q in E2M1 for s in E4M3}
    assert set(payload.double().abs().unique().tolist()) <= products


def test_a_block_at_each_scale_holds_all_16_codes_exactly() -> None:
    """With amax 2688 the tensor's scale is 1: a block of codes times an E4M3 number comes back as it is."""
    codes = torch.tensor(E2M1 + [-value for value in E2M1])
    x = torch.stack([codes * scale for scale in E4M3[1:]])
    payload, scale_inv = quantize_nvfp4(
        x, torch.tensor(2688.0), torch.float32, contracted=1, square=False, stochastic=False
    )
    assert float(scale_inv) == 1.0
    assert torch.equal(payload, x)
    across, _ = quantize_nvfp4(
        x.t(), torch.tensor(2688.0), torch.float32, contracted=0, square=False, stochastic=False
    )
    assert torch.equal(across, x.t())


def test_zero_blocks_tiny_blocks_and_tensors_that_are_not_finite() -> None:
    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_nvfp4(x, x.abs().max(), torch.float32, contracted=1, square=False, stochastic=True)

    zeros, scale_inv = quantized(torch.zeros(4, 32))
    assert torch.equal(zeros, torch.zeros(4, 32))
    assert float(scale_inv) == 1.0
    x = torch.zeros(3, 32)
    x[0], x[1, :16], x[2, 16:] = 1.0, 2.0**-18, 2.0**-19
    payload, scale_inv = quantized(x)
    assert (payload[0] * scale_inv).tolist() == pytest.approx([1.0] * 32)
    assert float(payload[1, :16].abs().min()) > 0
    assert torch.count_nonzero(payload[1, 16:]) == torch.count_nonzero(payload[2]) == 0
    for small in (1e-30, 1e-44):
        payload, scale_inv = quantized(torch.full((1, 16), small))
        assert torch.isfinite(payload).all()
        assert torch.isfinite(scale_inv)
    largest = torch.finfo(torch.float32).max
    payload, scale_inv = quantized(torch.full((1, 16), largest))
    assert (payload.double() * float(scale_inv) / largest).view(-1).tolist() == pytest.approx([1.0] * 16)
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.ones(2, 16)
        x[1, 3] = bad
        assert torch.isnan(quantized(x)[1])


def test_the_transform_is_hadamards_and_keeps_products() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(48, 20, generator=generator, dtype=torch.float64)
    b = torch.randn(48, 24, generator=generator, dtype=torch.float64)
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):  # Sylvester's construction
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    first = hadamard(torch.eye(16, dtype=torch.float64), 0)
    signs = first[0] * 4
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert torch.equal(first, h / 4 * signs)
    expected = torch.cat([h / 4 @ (signs[:, None] * block) for block in a.split(16)])
    assert torch.allclose(hadamard(a, 0), expected, rtol=0, atol=1e-14)
    assert torch.allclose(hadamard(a.t(), 1), expected.t(), rtol=0, atol=1e-14)
    assert torch.allclose(hadamard(a, 0).t() @ hadamard(b, 0), a.t() @ b, rtol=0, atol=1e-12)
    # 40 tokens: the last block is completed with zeros, of both operands.
    short_a, short_b = hadamard(a[:40], 0), hadamard(b[:40], 0)
    assert short_a.shape == (48, 20)
    assert torch.allclose(short_a.t() @ short_b, a[:40].t() @ b[:40], rtol=0, atol=1e-12)
    outlier = torch.zeros(16, 1)
    outlier[5] = 100.0
    assert hadamard(outlier, 0).abs().unique().tolist() == [25.0]


def test_stochastic_rounding_does_not_depend_on_the_cut_and_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(29)
    x = torch.randn(2048, 64, generator=generator)
    amax = x.abs().max()

    def rounded(part: Tensor, contracted: int = 1) -> Tensor:
        return quantize_nvfp4(
            part, amax, torch.float32, contracted=contracted, square=False, stochastic=True
        )[0]

    whole = rounded(x)
    assert torch.equal(torch.cat([rounded(part) for part in x.split(100)]), whole)
    assert torch.equal(torch.cat([rounded(part) for part in x.split(16, dim=1)], dim=1), whole)
    assert torch.equal(rounded(x.t().contiguous(), contracted=0), whole.t())
    permutation = torch.randperm(len(x), generator=generator)
    assert torch.equal(rounded(x[permutation]), whole[permutation])
    # The error of nearby values averages out: bins of 1/64 of a block's amax, where nearest has a bias of
    # up to half a code's width in each.
    share = (x.view(-1, 16) / x.view(-1, 16).abs().amax(1, keepdim=True)).view(-1)
    _, scale_inv = quantize_nvfp4(x, amax, torch.float32, contracted=1, square=False, stochastic=True)
    nearest_payload, _ = quantize_nvfp4(x, amax, torch.float32, contracted=1, square=False, stochastic=False)
    block_amax = x.view(-1, 16).abs().amax(1, keepdim=True).expand(-1, 16).reshape(-1)
    biases = {}
    for name, payload in (("stochastic", whole), ("nearest", nearest_payload)):
        error = ((payload * scale_inv - x).view(-1) / block_amax)[share.abs() < 0.95]
        index = ((share[share.abs() < 0.95] + 1) * 32).long()
        total = torch.zeros(64).index_add(0, index, error)
        number = torch.zeros(64).index_add(0, index, torch.ones_like(error))
        enough = number > 400
        biases[name] = float((total / number.clamp(min=1))[enough].square().mean().sqrt())
    print(biases)
    assert biases["stochastic"] < 0.25 * biases["nearest"]


def test_bits_of_blocks_are_uniform_and_independent() -> None:
    generator = torch.Generator().manual_seed(31)
    blocks = torch.randn(4096, 16, generator=generator).to(torch.bfloat16).float()
    bits = block_bits(blocks)
    for shift in range(32):
        share = float(((bits >> shift) & 1).double().mean())
        assert share == pytest.approx(0.5, abs=4.5 * 0.5 / bits.numel() ** 0.5), shift
    uniform = (bits & 0xFFFFFF).double() / 2**24 - 0.5
    correlation = torch.corrcoef(torch.cat((uniform.t(), blocks.double().t())))
    off = correlation - torch.eye(32)
    assert float(off.abs().max()) < 5 / 4096**0.5
    changed = blocks.clone()
    changed[:, 3] += 1.0  # one value of a block changes the bits of all
    assert float((block_bits(changed) == bits).double().mean()) < 1e-3
    assert torch.equal(block_bits(-0.0 * blocks), block_bits(0.0 * blocks))
