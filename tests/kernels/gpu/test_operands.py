"""The launchers of operand casts against their references, and those against the package's casts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import operands
from fp8train.kernels.operands import CastOperand, CastRule, amax_partials, cast_operand
from fp8train.numerics.cast import quantize
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same

SPECS = [
    QuantSpec(E4M3),
    QuantSpec(E5M2, margin=2),
    QuantSpec(E4M3, power_of_two=False),
    QuantSpec(E5M2, scale_source="constant", constant_exponent=-3),
]
SHAPES = [(64, 128), (1, 16), (80, 272), (67, 131), (200, 48), (0, 32)]


def source(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x *= torch.exp2(torch.randint(-12, 12, shape, generator=torch.Generator().manual_seed(seed + 1)))
    return x.to(dtype)


def both(x: Tensor, spec: QuantSpec, delayed: Tensor | None = None) -> tuple[CastOperand, CastOperand]:
    rule, partials = CastRule.of(spec), operands._amax_op.launch(x)
    assert partials.shape == operands._amax_partials_fake(x).shape
    assert same(partials.abs().amax(), amax_partials(x).amax())
    launched = operands._cast_op.launch(x, partials, delayed, *rule, True, True)
    return launched, cast_operand(x, amax_partials(x), rule, delayed=delayed, turned=True)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_in_both_layouts(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = source(shape, dtype)
    launched, reference = both(x, spec)
    for ours, theirs in zip(launched, reference, strict=True):
        assert same(ours, theirs)
    payload, scale_inv = quantize(x, spec)
    height, width = shape
    assert same(launched.codes[:height, :width], payload)
    assert same(launched.scale_inv, scale_inv)
    assert same(launched.turned, launched.codes.t())
    outside = launched.codes.view(torch.uint8).clone()
    outside[:height, :width] = 0
    assert not outside.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sources_that_are_not_finite_mark_the_scale(spec: QuantSpec, value: float) -> None:
    x = source((48, 64), torch.bfloat16)
    x[17, 3] = value
    launched, reference = both(x, spec)
    assert launched.scale_inv.isnan() and not launched.amax.isfinite()
    for ours, theirs in zip(launched, reference, strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
@pytest.mark.parametrize("delayed", [0.0, 0.25, 1024.0])
def test_delayed_scales_replace_the_amaxes(spec: QuantSpec, delayed: float) -> None:
    for ours, theirs in zip(*both(source((40, 72), torch.float32), spec, torch.tensor(delayed)), strict=True):
        assert same(ours, theirs)


def test_extreme_amaxes() -> None:
    for value in (0.0, 1e-45, 2.0**-126, 3e38):
        for spec in (SPECS[0], SPECS[2]):
            for ours, theirs in zip(*both(torch.full((16, 16), value), spec), strict=True):
                assert same(ours, theirs)


@pytest.mark.parametrize(("straight", "turned"), [(True, False), (False, True)])
def test_only_the_layout_that_is_wanted(straight: bool, turned: bool) -> None:
    x = source((32, 48), torch.bfloat16)
    args = (x, amax_partials(x), None, *CastRule.of(SPECS[0]), straight, turned)
    for ours, theirs, fake in zip(
        operands._cast_op.launch(*args),
        operands._cast_operand(*args),
        operands._cast_operand_fake(*args),
        strict=True,
    ):
        assert same(ours, theirs)
        assert ours.shape == fake.shape and ours.dtype == fake.dtype


def test_an_amax_of_many_pieces() -> None:
    x = torch.zeros(8192 * 3 + 5, dtype=torch.bfloat16)
    x[-1] = -7.0
    partials = operands._amax_op.launch(x)
    assert partials.tolist() == [7.0, 0.0, 0.0, 0.0] or partials.amax() == 7.0
    assert len(partials) == 4


@pytest.mark.parametrize("shape", [*SHAPES, (64, 0)], ids=str)
def test_turning_codes(shape: tuple[int, int]) -> None:
    codes = torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert same(
        operands._turn_op.launch(codes.view(torch.float8_e5m2)).view(torch.uint8), codes.t().contiguous()
    )
