"""The launchers of casts with scales of rows and blocks against their references, those against the package's
casts and padding, and against FP64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fp8train.kernels import group_operands
from fp8train.kernels.fused_op import FusedOp
from fp8train.kernels.gpu.launch import Launch, observed
from fp8train.kernels.group_operands import GroupOperand, GroupRule, TwoOperands, cast_both, cast_groups
from fp8train.kernels.padding import padded
from fp8train.numerics.cast import quantize
from fp8train.numerics.granularity import expand_scales
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import Granularity
from tests.kernels.gpu.same import same

GRANULARITIES: list[Granularity] = ["row", "block_1x128", "block_128x128", "mx_1x32"]
DIRECTED: list[Granularity] = ["row", "block_1x128", "mx_1x32"]
SHAPES = [(64, 128), (1, 40), (40, 1), (80, 272), (131, 67), (200, 48), (129, 300)]
EMPTY = [(0, 32), (32, 0), (0, 0)]


def source(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for size in ((shape[0], 1), (1, shape[1])):
        x *= torch.exp2(torch.randint(-12, 12, size, generator=generator))
    return x.to(dtype)


def specs(granularity: Granularity) -> list[QuantSpec]:
    found = [QuantSpec(E4M3, granularity), QuantSpec(E5M2, granularity, margin=2)]
    return found if granularity == "mx_1x32" else [*found, QuantSpec(E4M3, granularity, power_of_two=False)]


def results(op: FusedOp, *args: object) -> tuple[Tensor, ...]:
    """What the launcher gives, which must be what the reference gives, in memory as the declaration says."""
    launched, reference = op.launch(*args), op.reference(*args)
    fake = op(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    for ours, theirs, declared in zip(launched, reference, fake, strict=True):
        assert same(ours, theirs)
        assert (declared.shape, declared.dtype) == (theirs.shape, theirs.dtype)
        if theirs.numel() > 1:
            assert ours.stride() == declared.stride()
            assert all(
                a == b for a, b, n in zip(ours.stride(), theirs.stride(), ours.shape, strict=True) if n > 1
            )
    return tuple(launched)


def check(x: Tensor, spec: QuantSpec, contracted: int) -> GroupOperand:
    """One cast in both layouts, against the package's cast and padding."""
    args = (x, *GroupRule.of(spec), contracted, True, True)
    out = GroupOperand(*results(group_operands._groups_op, *args))
    payload, scale_inv = padded(quantize(x, spec, contracted=contracted))
    assert same(out.codes, payload) and same(out.turned, payload.t())
    assert same(out.scale_inv, scale_inv)
    return out


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_codes_in_both_layouts(granularity: Granularity, shape: tuple[int, int], contracted: int) -> None:
    for spec in specs(granularity):
        check(source(shape), spec, contracted)
    check(source(shape, torch.float32), specs(granularity)[0], contracted)


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_in_fp64(granularity: Granularity, contracted: int) -> None:
    """Decoded codes times scales are within half a unit of the last place of the source, group by group."""
    x = source((144, 288), torch.float32)
    out = check(x, QuantSpec(E4M3, granularity), contracted)
    wide = expand_scales(out.scale_inv, out.codes.shape).double()
    decoded = out.codes.double() * wide
    smallest = 2.0**-10 * wide
    assert ((decoded - x.double()).abs() <= torch.maximum(x.double().abs() * 2.0**-4, smallest)).all()
    assert (out.codes.float().abs().amax() > 224.0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_group_that_is_not_finite_marks_its_own_scale(granularity: Granularity, value: float) -> None:
    x = source((144, 160))
    x[17, 3] = value
    for contracted, spec in itertools.product((0, 1), specs(granularity)):
        out = check(x, spec, contracted)
        marked = expand_scales(out.scale_inv, out.codes.shape).expand(out.codes.shape).isnan()
        assert marked[17, 3]
        assert out.scale_inv.isnan().sum() == 1


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 2.0**-126, 3e38])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_extreme_amaxes(granularity: Granularity, value: float) -> None:
    x = torch.full((48, 144), value)
    for contracted, spec in itertools.product((0, 1), specs(granularity)):
        check(x, spec, contracted)


@pytest.mark.parametrize(("straight", "turned"), [(True, False), (False, True)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_the_layout_that_is_wanted(granularity: Granularity, straight: bool, turned: bool) -> None:
    x = source((40, 144))
    for contracted in (0, 1):
        rule = GroupRule.of(QuantSpec(E4M3, granularity))
        out = results(group_operands._groups_op, x, *rule, contracted, straight, turned)
        assert bool(out[0].numel()) == straight and bool(out[1].numel()) == turned
        called = cast_groups(x, rule, contracted=contracted, straight=straight, turned=turned)
        assert all(same(a, b) for a, b in zip(out, called, strict=True))


@pytest.mark.parametrize("granularity", DIRECTED)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_one_read_for_two_gemms(granularity: Granularity, shape: tuple[int, int]) -> None:
    """Both casts are those that are made one by one."""
    for spec in specs(granularity):
        x, rule = source(shape), GroupRule.of(spec)
        out = TwoOperands(*results(group_operands._both_op, x, *rule))
        forward = cast_groups(x, rule, contracted=1)
        back = cast_groups(x, rule, contracted=0, straight=False, turned=True)
        assert same(out.codes, forward.codes) and same(out.scale_inv, forward.scale_inv)
        assert same(out.turned, back.turned) and same(out.turned_scale_inv, back.scale_inv)
        assert all(same(a, b) for a, b in zip(out, cast_both(x, rule), strict=True))


@pytest.mark.parametrize("granularity", DIRECTED)
def test_two_gemms_of_a_source_that_is_not_finite(granularity: Granularity) -> None:
    x = source((48, 144), torch.float32)
    x[3, 5], x[40, 130] = torch.inf, torch.nan
    out = TwoOperands(
        *results(group_operands._both_op, x, *GroupRule.of(QuantSpec(E5M2, granularity, margin=1)))
    )
    assert out.scale_inv.isnan().sum() == 2
    assert out.turned_scale_inv.isnan().sum() == 2


def test_columns_longer_than_one_program_takes() -> None:
    """More tiles of 64 rows than there are parts: some programs take two."""
    x = source((64 * 64 + 70, 3))
    out = results(group_operands._both_op, x, *GroupRule.of(QuantSpec(E4M3, "row")))
    assert same(out[3], padded(quantize(x, QuantSpec(E4M3, "row"), contracted=0))[1])


def test_rows_longer_than_what_is_held_of_them() -> None:
    x = source((5, 2100))
    check(x, QuantSpec(E4M3, "row"), 1)
    results(group_operands._both_op, x, *GroupRule.of(QuantSpec(E4M3, "row", power_of_two=False)))
    results(group_operands._groups_op, x, *GroupRule.of(QuantSpec(E4M3, "row")), 1, True, False)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_launches_are_those_declared(granularity: Granularity) -> None:
    seen: list[Launch] = []
    rule = GroupRule.of(QuantSpec(E4M3, granularity))
    x = torch.empty(200, 300, dtype=torch.bfloat16, device="meta")
    calls = [(group_operands._groups_op, (x, *rule, contracted, True, True)) for contracted in (0, 1)]
    if granularity in DIRECTED:
        calls.append((group_operands._both_op, (x, *rule)))
    with observed(lambda launch: bool(seen.append(launch))):
        for op, args in calls:
            seen.clear()
            cost = op.cost(args, op.launch(*args))
            assert len(seen) == cost.launches
            assert cost.launches * 2 * x.numel() <= cost.read < cost.launches * 2 * x.numel() * 1.2
            assert cost.written >= 2 * 208 * 304


def test_specs_that_are_cast_elsewhere() -> None:
    with pytest.raises(AssertionError, match="elsewhere"):
        GroupRule.of(QuantSpec(E4M3))
    with pytest.raises(AssertionError, match="one cast serves both"):
        cast_both(source((16, 16)), GroupRule.of(QuantSpec(E4M3, "block_128x128")))
