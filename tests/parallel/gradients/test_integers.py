"""Integer sums of gradients: their norm on an agreed grid, and what a recorder sees of the casts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8train.comm.auto_scale import MuController
from fp8train.comm.collectives import CountedGroup
from fp8train.config.batch_sizes import MAX_EXACT_MICRO_BATCHES
from fp8train.numerics.statistics import CastRecorder
from fp8train.parallel.gradients.auto_scales import AutoScales
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.grids import GridScales, HeldSums
from fp8train.parallel.gradients.integer_storage import FixedPoints, Fp8Points, IntegerStorage
from fp8train.parallel.gradients.integer_sum import IntegerSum
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import Member, Places, row_elements
from fp8train.parallel.gradients.scales import GradientScales
from fp8train.parallel.gradients.shared_scale_sum import SharedScaleSum
from fp8train.parallel.gradients.tensor_storage import TensorStorage
from fp8train.precision.number_formats import E4M3
from tests.numerics.fp8_table import E4M3_TABLE
from tests.numerics.test_statistics import brute_force
from tests.parallel.gradients.reading import gradient_in

CPU = torch.device("cpu")
SHAPES = [(24, 40), (7,), (1, 5)]


KINDS = [Fp8Points, FixedPoints]


def bucket_of(
    kind: type[Fp8Points] | type[FixedPoints],
    micro_batches: int,
    numels: list[int] | None = None,
    *,
    shapes: list[tuple[int, ...]] = SHAPES,
    recorder=None,
) -> tuple[Bucket, GridScales]:
    """A bucket of ``shapes``; the whole parameters may be larger (``numels``)."""
    members = [Member(f"m{i}.weight", shape) for i, shape in enumerate(shapes)]
    scales = GridScales(
        [kind is Fp8Points] * len(shapes),
        numels or [member.numel for member in members],
        position={member.fqn: i for i, member in enumerate(members)},
        micro_batches=micro_batches,
        group=CountedGroup(None),
        device=CPU,
    )
    places = Places(members, row_elements(members))
    points = FixedPoints() if kind is FixedPoints else Fp8Points(recorder)
    storage = IntegerStorage(places, points, scales=scales, device=CPU)
    return Bucket(storage, IntegerSum(storage, CountedGroup(None))), scales


def sums_of(bucket: Bucket) -> HeldSums:
    held = bucket.held
    assert isinstance(held, HeldSums)
    return held


def gradients(seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 1e-3).to(dtype) for shape in SHAPES]


def run_pass(bucket: Bucket, scales: GradientScales, micro_batches: list[list[Tensor]]) -> None:
    scales.begin_step()
    bucket.begin()
    for i, micro_batch in enumerate(micro_batches):
        for member, gradient in enumerate(micro_batch):
            bucket.add(member, gradient, first=i == 0)
    bucket.launch()
    bucket.advance()
    bucket.finish()
    scales.end_step()


def run_step(bucket: Bucket, scales: GridScales, micro_batches: list[list[Tensor]]) -> int:
    """A step, repeated where grids did not fit; how many passes it took."""
    passes = 1
    run_pass(bucket, scales, micro_batches)
    while scales.must_repeat():
        run_pass(bucket, scales, micro_batches)
        passes += 1
    return passes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [None, [2**30, 2**33, 2**20]], ids=["whole", "part"])
def test_the_norm_is_that_of_the_gradient_and_parts_add_up_to_it(
    kind: type[Fp8Points] | type[FixedPoints], whole: list[int] | None
) -> None:
    bucket, scales = bucket_of(kind, 4, whole)
    run_step(bucket, scales, [gradients(seed) for seed in range(4)])
    assert whole is None or int(scales.step.square_shifts.max()) > 0
    for member in range(len(SHAPES)):
        total, unit = (number.item() for number in sums_of(bucket).square(member))
        assert math.frexp(unit)[0] == 0.5, "a power of two"
        # Beside Python's integers: the error of the grid is half a step for each element that is here.
        true = sum(value**2 for value in sums_of(bucket)._integers(member).tolist())
        step = 2 ** int(scales.step.square_shifts[member])
        assert abs(total * step - true) <= bucket.members[member].numel * step / 2 + true * 2**-51
        norm = float(bucket.norms(torch.float64)[member])
        assert norm == math.sqrt(total * unit)
        if whole is None:
            expected = float(gradient_in(bucket, member).double().square().sum()) ** 0.5
            assert norm == pytest.approx(expected, rel=2**-20)


def test_the_grid_of_squares_does_not_depend_on_the_part_that_a_rank_holds() -> None:
    """Two ranks with one half each, and one with all: equal sums."""
    shape = (64, 48)
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 4)

    def square_sum(part: Tensor) -> int:
        bucket, scales = bucket_of(Fp8Points, 64, [2**34], shapes=[tuple(part.shape)])
        scales._history[0] = value.abs().max()  # agreed by the ranks
        scales.begin_step()
        scales.step.amax[0] = value.abs().max()
        bucket.begin()
        bucket.add(0, part, first=True)
        bucket.launch()
        bucket.finish()
        scales.end_step()
        assert int(scales.step.square_shifts[0]) > 10
        return int(sums_of(bucket).square(0)[0])

    assert square_sum(value[:20]) + square_sum(value[20:]) == square_sum(value)
    assert square_sum(value[:, 5:]) + square_sum(value[:, :5]) == square_sum(value)


def test_no_sum_of_codes_exceeds_int32_or_its_square_grid() -> None:
    """All elements saturate in every one of the most micro-batches that are allowed."""
    bucket, scales = bucket_of(Fp8Points, MAX_EXACT_MICRO_BATCHES, [2**40] * len(SHAPES))
    scales._history[0] = 1.0
    scales.begin_step()
    bucket.begin()
    huge = [torch.full(shape, -1e30) for shape in SHAPES]
    for member, gradient in enumerate(huge):
        bucket.add(member, gradient, first=True)
        sums = bucket.storage.buffer(member)
        sums.mul_(MAX_EXACT_MICRO_BATCHES)  # as if each had added the same
        assert sums.flatten().tolist()[0] == -448 * 512 * MAX_EXACT_MICRO_BATCHES
    bucket.launch()
    bucket.finish()
    scales.end_step()
    for member, shape in enumerate(SHAPES):
        one = int(sums_of(bucket).square(member)[0]) // math.prod(shape)
        assert 2**60 < one * 2**40 < 2**63
    with pytest.raises(AssertionError, match="overflow INT32"):
        bucket_of(Fp8Points, MAX_EXACT_MICRO_BATCHES + 1)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_makes_the_norm_nan(
    kind: type[Fp8Points] | type[FixedPoints], bad: float
) -> None:
    bucket, scales = bucket_of(kind, 2)
    good, broken = gradients(1), gradients(2)
    run_step(bucket, scales, [good, good])
    broken[0][3, 4] = bad
    run_step(bucket, scales, [broken, good])
    norms = bucket.norms(torch.float64).tolist()
    assert math.isnan(norms[0])
    assert all(math.isfinite(norm) for norm in norms[1:])


def read(bucket: Bucket) -> list[Tensor]:
    """What the optimizer would read."""
    return [
        bucket.reader(member).chunk(0, math.prod(shape)).view(shape) for member, shape in enumerate(SHAPES)
    ]


def snr(got: Tensor, true: Tensor) -> float:
    error = (got.double() - true.double()).square().sum()
    return float(10 * torch.log10(true.double().square().sum() / error))


def fp64_sums(micro_batches: list[list[Tensor]]) -> list[Tensor]:
    return [sum(one[member].double() for one in micro_batches) for member in range(len(SHAPES))]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_added_whatever_amaxes_do(
    kind: type[Fp8Points] | type[FixedPoints],
) -> None:
    """Amaxes that grow, fall, jump and vanish; scale state moves before the sums are read."""
    bucket, scales = bucket_of(kind, 3)
    factors = [1, 1, 3, 0.2, 1e3, 1e3, 1, 1e6, 1, 1, 0, 1, 1e-4, 1e-4, 40, 1, 0.03, 0.01, 1e-6, 1]
    repeated = []
    for step, factor in enumerate(factors):
        micro_batches = [[g * factor for g in gradients(3 * step + i)] for i in range(3)]
        repeated.append(run_step(bucket, scales, micro_batches) > 1)
        scales.commit()  # before anyone reads
        for got, true in zip(read(bucket), fp64_sums(micro_batches), strict=True):
            if factor == 0:
                assert not got.any()
                continue
            ratio = float((got.double() * true).sum() / true.square().sum())
            assert abs(ratio - 1) < 0.07, (step, factor, ratio)  # 3 bits of mantissa
        whole, true = read(bucket)[0], fp64_sums(micro_batches)[0]
        assert factor == 0 or snr(whole, true) > (28 if kind is Fp8Points else 60), (step, factor)
    assert int(scales.saturated) == 0
    assert repeated[0] and not repeated[1] and not repeated[2], "the first step, and none that fits"
    assert repeated[4] and repeated[7] and scales.repeated == sum(repeated)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0.0, math.inf, math.nan])
def test_a_parameter_without_an_amax_gets_its_grid_from_the_first_step_that_has_one(
    kind: type[Fp8Points] | type[FixedPoints], first: float
) -> None:
    bucket, scales = bucket_of(kind, 2)
    for seed in range(2):
        nothing = gradients(seed)
        nothing[1] = torch.full_like(nothing[1], first)
        assert run_step(bucket, scales, [nothing, nothing]) == (2 if seed == 0 and first == 0 else 1)
        if math.isfinite(first):
            scales.commit()
    micro_batches = [gradients(7), gradients(8)]
    assert run_step(bucket, scales, micro_batches) == 2
    scales.commit()
    for got, true in zip(read(bucket), fp64_sums(micro_batches), strict=True):
        assert snr(got, true) > 25
    assert run_step(bucket, scales, [gradients(9), gradients(10)]) == 1


def test_an_fp64_gradient_just_above_its_fp32_amax_stays_below_the_bound_of_the_square_grid() -> None:
    """2^24 + 1/2 rounds down to FP32, so the grid point exceeds that of the amax: what the slack is for."""
    bucket, scales = bucket_of(FixedPoints, 1, shapes=[(1,)])
    value = torch.tensor([1 + 2.0**-24 - 2.0**-40], dtype=torch.float64)
    assert float(value.abs().max().float()) == 1.0 < float(value)
    run_step(bucket, scales, [[value]])
    point = int(sums_of(bucket)._integers(0)[0])
    assert point > float(scales.step.amax[0]) * 2.0 ** int(scales.step.exponents[0]) + 1
    assert point <= float(scales.step._largest_integers()[0])


class Recorder:
    """A cast recorder whose sites are the parameters' names."""

    def __init__(self, fqns: list[str]) -> None:
        self.rows = CastRecorder(fqns, CPU)
        self.active = False

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """See :class:`~fp8train.parallel.gradients.recorder.GradientRecorder`."""
        self.rows.record(fqn, source, payload, scale_inv)


def expected_row(source: Tensor, scale: float) -> dict[str, float]:
    """Statistics of a cast with this scale, element by element in Python."""
    codes = torch.tensor([E4M3_TABLE.encode(x * scale) for x in source.flatten().tolist()])
    return brute_force(source.double().numpy(), codes.numpy(), 1 / scale, E4M3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_exact_are_those_of_the_last_micro_batch(dtype: torch.dtype) -> None:
    recorder = Recorder([f"m{i}.weight" for i in range(len(SHAPES))])
    bucket, scales = bucket_of(Fp8Points, 3, recorder=recorder)
    micro_batches = [gradients(seed, dtype) for seed in range(3)]
    run_step(bucket, scales, micro_batches)
    assert recorder.rows.collect() == {}, "the step was not sampled"
    recorder.active = True
    scales.commit()
    micro_batches[2][0] *= 40  # beyond the margin: some saturate in the first pass
    run_pass(bucket, scales, micro_batches)
    rows = recorder.rows.collect()
    for member, source in enumerate(micro_batches[2]):
        scale = 2.0 ** int(scales.step.exponents[member])
        assert rows[f"m{member}.weight"] == pytest.approx(expected_row(source, scale), rel=1e-5), member
    assert rows["m0.weight"]["saturated"] > 0
    assert int(scales.step.outside) == round(rows["m0.weight"]["saturated"] * 24 * 40)


@pytest.mark.parametrize("accumulate", [torch.bfloat16, torch.float32])
def test_rows_of_shared_scale_are_those_of_the_cast_onto_the_wire(accumulate: torch.dtype) -> None:
    """The cast of the sum over micro-batches, with the auto-scaling factor."""
    recorder = Recorder([f"m{i}.weight" for i in range(len(SHAPES))])
    mu = torch.tensor([0.5, 1.0, 0.25])
    members = [Member(f"m{i}.weight", shape) for i, shape in enumerate(SHAPES)]
    controller = MuController([member.fqn for member in members], world_size=1, device=CPU)
    controller.mu.copy_(mu)
    scales = AutoScales(
        controller,
        position={member.fqn: i for i, member in enumerate(members)},
        numels=[member.numel for member in members],
        counted_over=None,
    )
    places = Places(members, row_elements(members))
    storage = TensorStorage(places, fmt=E4M3, accumulate=accumulate, memory=Memory(CPU))
    group = CountedGroup(None)
    reduction = SharedScaleSum(
        storage, group, scales=scales, agree=group, algorithm="ring", purpose="gradient", recorder=recorder
    )
    bucket = Bucket(storage, reduction)
    micro_batches = [gradients(seed) for seed in range(3)]
    for sampled in (False, True):
        recorder.active = sampled
        run_pass(bucket, scales, micro_batches)
        assert bool(recorder.rows.collect()) == sampled
    for member in range(len(SHAPES)):
        source = torch.zeros(SHAPES[member], dtype=accumulate)
        for micro_batch in micro_batches:
            source += micro_batch[member]
        amax = float(source.abs().max())
        exponent = math.floor(math.log2(448 / amax))
        scale = 2.0**exponent * float(mu[member])
        row = recorder.rows.collect()[f"m{member}.weight"]
        assert row == pytest.approx(expected_row(source, scale), rel=1e-5), member
