"""The scale of least squared error against a search over all exponents in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8train.numerics.cast import amax_of
from fp8train.numerics.mse_scale import magnitude_counts, mse_scale
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE

TABLES = {E4M3: E4M3_TABLE, E5M2: E5M2_TABLE}


def choose(x: Tensor, fmt: Format) -> float:
    scale, scale_inv = mse_scale(amax_of(x), magnitude_counts(x), QuantSpec(fmt, scale_source="mse"))
    assert float(scale * scale_inv) == 1.0
    return float(scale)


def cost(x: np.ndarray, fmt: Format, scale: float) -> float:
    """Mean squared error, element by element."""
    table = TABLES[fmt]
    quantised = np.array([table.decode(table.encode(float(v) * scale)) for v in x]) / scale
    return float(np.square(x - quantised).sum())


def cases() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(512, generator=generator)
    found = [normal.bfloat16() * 2.0**k for k in (-30, 0, 7)]
    found += [torch.linspace(low, low * 1.3, 200).bfloat16() for low in (1.5, 1.74, 1.76, 1.8, 1.9)]
    # Just above 1.75 · 2^k: clipping the largest costs less than rounding the smallest.
    found.append(
        torch.cat([torch.tensor([1.7578125]), torch.rand(300, generator=generator) * 1e-5]).bfloat16()
    )
    found.append(
        torch.cat([torch.tensor([1.9921875]), torch.rand(300, generator=generator) * 1e-5]).bfloat16()
    )
    return found


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
def test_no_exponent_has_a_smaller_error(fmt: Format) -> None:
    chosen_above = 0
    for x in cases():
        scale = choose(x, fmt)
        wide = x.double().numpy()
        costs = {k: cost(wide, fmt, scale * 2.0**k) for k in range(-6, 7)}
        assert costs[0] == min(costs.values()), (costs, scale)
        chosen_above += scale * float(x.abs().max()) > TABLES[fmt].max
    # Some tensors are better clipped. E5M2's subnormals are too small beside amax for that to show in FP64.
    assert (0 < chosen_above < len(cases())) if fmt is E4M3 else chosen_above == 0


def test_what_depends_on_parts_adds_up() -> None:
    """Counts of parts add up to those of the whole, bit for bit, in any order."""
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    whole = magnitude_counts(x)
    assert int(whole.sum()) == x.numel()
    assert torch.equal(whole, sum(magnitude_counts(part) for part in reversed(x.split(130))))
    assert torch.equal(whole, magnitude_counts(x.flip(0).t()))


def test_edges() -> None:
    assert choose(torch.zeros(5), E4M3) == 1.0
    assert choose(torch.tensor([1e-45]), E4M3) == 2.0**126
    for bad in (torch.nan, torch.inf):
        x = torch.tensor([1.0, bad])
        scale, scale_inv = mse_scale(amax_of(x), magnitude_counts(x), QuantSpec(E4M3, scale_source="mse"))
        assert float(scale) == 1.0
        assert torch.isnan(scale_inv)
