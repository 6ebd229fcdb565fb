"""Integer sums of gradients: their norm on an agreed grid, and what a recorder sees of the casts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.numerics.formats import E4M3
from fp8train.numerics.statistics import CastRecorder
from fp8train.parallel.buckets import Member
from fp8train.parallel.exact import (
    MAX_MICRO_BATCHES,
    ExactBucket,
    ExactFixedPointBucket,
    ExactFp8Bucket,
    GridScales,
)
from fp8train.parallel.shared_scale_bucket import SharedScaleBucket, SharedState
from tests.numerics.fp8_table import E4M3_TABLE
from tests.numerics.test_statistics import brute_force

CPU = torch.device("cpu")
SHAPES = [(24, 40), (7,), (1, 5)]


def bucket_of(
    kind: type[ExactBucket], micro_batches: int, numels: list[int] | None = None, **changes
) -> tuple[ExactBucket, GridScales]:
    """A bucket of ``SHAPES``; the whole parameters may be larger (``numels``)."""
    members = [Member(f"m{i}.weight", shape) for i, shape in enumerate(SHAPES)]
    scales = GridScales(
        [kind is ExactFp8Bucket] * len(SHAPES),
        numels or [member.numel for member in members],
        micro_batches=micro_batches,
        group=CountedGroup(None),
        device=CPU,
    )
    bucket = kind(
        members,
        scales=scales,
        parameters=range(len(SHAPES)),
        group=CountedGroup(None),
        contributions=micro_batches,
        device=CPU,
        **changes,
    )
    return bucket, scales


def gradients(seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 1e-3).to(dtype) for shape in SHAPES]


def run_step(bucket: ExactBucket, scales: GridScales, micro_batches: list[list[Tensor]]) -> None:
    """A calibration of the grids by the first micro-batch, then a step."""
    for calibrating in (True, False) if not scales.calibrated else (False,):
        scales.calibrating = calibrating
        scales.begin_step()
        for i, micro_batch in enumerate(micro_batches[:1] if calibrating else micro_batches):
            for member, gradient in enumerate(micro_batch):
                bucket.add(member, gradient, first=i == 0)
        bucket.launch()
        bucket.finish()
        scales.agree()
        if calibrating:
            scales.calibrating = False
            scales.commit()


@pytest.mark.parametrize("kind", [ExactFp8Bucket, ExactFixedPointBucket])
@pytest.mark.parametrize("whole", [None, [2**30, 2**33, 2**20]], ids=["whole", "part"])
def test_the_norm_is_that_of_the_gradient_and_parts_add_up_to_it(
    kind: type[ExactBucket], whole: list[int] | None
) -> None:
    bucket, scales = bucket_of(kind, 4, whole)
    run_step(bucket, scales, [gradients(seed) for seed in range(4)])
    assert whole is None or int(scales.square_shifts.max()) > 0
    for member in range(len(SHAPES)):
        unit = float(bucket.square_unit(member))
        assert math.frexp(unit)[0] == 0.5, "a power of two"
        total = int(bucket.square_sum(member))
        # Beside Python's integers: the error of the grid is half a step for each element that is here.
        true = sum(value**2 for value in bucket._flat(member).tolist())
        step = 2 ** int(scales.square_shifts[member])
        assert abs(total * step - true) <= bucket.members[member].numel * step / 2 + true * 2**-51
        norm = float(bucket.norm(member, torch.float64))
        assert norm == math.sqrt(total * unit)
        if whole is None:
            expected = float(bucket.grad(member).double().square().sum()) ** 0.5
            assert norm == pytest.approx(expected, rel=2**-20)


def test_the_grid_of_squares_does_not_depend_on_the_part_that_a_rank_holds() -> None:
    """Two ranks with one half each, and one with all: equal sums."""
    shape = (64, 48)
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 4)

    def square_sum(part: Tensor) -> int:
        scales = GridScales([True], [2**34], micro_batches=64, group=CountedGroup(None), device=CPU)
        bucket = ExactFp8Bucket(
            [Member("w", tuple(part.shape))],
            scales=scales,
            parameters=[0],
            group=CountedGroup(None),
            contributions=64,
            device=CPU,
        )
        scales._history[0] = scales._amax[0] = value.abs().max()  # agreed by the ranks
        scales.restored()
        bucket.add(0, part, first=True)
        scales.agree()
        assert int(scales.square_shifts[0]) > 10
        return int(bucket.square_sum(0))

    assert square_sum(value[:20]) + square_sum(value[20:]) == square_sum(value)
    assert square_sum(value[:, 5:]) + square_sum(value[:, :5]) == square_sum(value)


def test_no_sum_of_codes_exceeds_int32_or_its_square_grid() -> None:
    """All elements saturate in every one of the most micro-batches that are allowed."""
    bucket, scales = bucket_of(ExactFp8Bucket, MAX_MICRO_BATCHES, [2**40] * len(SHAPES))
    scales._history[0] = 1.0
    scales.restored()
    scales.begin_step()
    huge = [torch.full(shape, -1e30) for shape in SHAPES]
    for member, gradient in enumerate(huge):
        bucket.add(member, gradient, first=True)
        bucket._flat(member).mul_(MAX_MICRO_BATCHES)  # as if each had added the same
        assert bucket._flat(member).tolist()[0] == -448 * 512 * MAX_MICRO_BATCHES
    scales.agree()
    for member, shape in enumerate(SHAPES):
        one = int(bucket.square_sum(member)) // math.prod(shape)
        assert 2**60 < one * 2**40 < 2**63
    with pytest.raises(AssertionError, match="overflow INT32"):
        bucket_of(ExactFp8Bucket, MAX_MICRO_BATCHES + 1)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", [ExactFp8Bucket, ExactFixedPointBucket])
def test_a_gradient_that_is_not_finite_makes_the_norm_nan(kind: type[ExactBucket], bad: float) -> None:
    bucket, scales = bucket_of(kind, 2)
    good, broken = gradients(1), gradients(2)
    run_step(bucket, scales, [good, good])
    broken[0][3, 4] = bad
    run_step(bucket, scales, [broken, good])
    norms = [float(bucket.norm(member, torch.float64)) for member in range(len(SHAPES))]
    assert math.isnan(norms[0])
    assert all(math.isfinite(norm) for norm in norms[1:])


class Recorder:
    """A cast recorder whose sites are the parameters' names."""

    def __init__(self, fqns: list[str]) -> None:
        self.rows = CastRecorder(fqns, CPU)
        self.active = False

    def record(self, fqn: str, source: Tensor, payload: Tensor, scale_inv: Tensor) -> None:
        """See :class:`~fp8train.parallel.buckets.GradientRecorder`."""
        self.rows.record(fqn, source, payload, scale_inv)


def expected_row(source: Tensor, scale: float) -> dict[str, float]:
    """Statistics of a cast with this scale, element by element in Python."""
    codes = torch.tensor([E4M3_TABLE.encode(x * scale) for x in source.flatten().tolist()])
    return brute_force(source.double().numpy(), codes.numpy(), 1 / scale, E4M3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_exact_are_those_of_the_last_micro_batch(dtype: torch.dtype) -> None:
    recorder = Recorder([f"m{i}.weight" for i in range(len(SHAPES))])
    bucket, scales = bucket_of(ExactFp8Bucket, 3, recorder=recorder)
    micro_batches = [gradients(seed, dtype) for seed in range(3)]
    run_step(bucket, scales, micro_batches)
    assert recorder.rows.collect() == {}, "the step was not sampled"
    recorder.active = True
    micro_batches[2][0] *= 40  # beyond the margin: some saturate
    run_step(bucket, scales, micro_batches)
    rows = recorder.rows.collect()
    for member, source in enumerate(micro_batches[2]):
        scale = 2.0 ** int(scales.exponents[member])
        assert rows[f"m{member}.weight"] == pytest.approx(expected_row(source, scale), rel=1e-5), member
    assert rows["m0.weight"]["saturated"] > 0
    assert int(scales._step_saturated) == round(rows["m0.weight"]["saturated"] * 24 * 40)


@pytest.mark.parametrize("accumulate", [torch.bfloat16, torch.float32])
def test_rows_of_shared_scale_are_those_of_the_cast_onto_the_wire(accumulate: torch.dtype) -> None:
    """The cast of the sum over micro-batches, with the auto-scaling factor."""
    recorder = Recorder([f"m{i}.weight" for i in range(len(SHAPES))])
    mu = torch.tensor([0.5, 1.0, 0.25])
    bucket = SharedScaleBucket(
        [Member(f"m{i}.weight", shape) for i, shape in enumerate(SHAPES)],
        fmt=E4M3,
        accumulate=accumulate,
        state=SharedState(mu, torch.zeros(3, dtype=torch.int64), torch.arange(3)),
        group=CountedGroup(None),
        algorithm="ring",
        purpose="gradient",
        recorder=recorder,
        device=CPU,
    )
    micro_batches = [gradients(seed) for seed in range(3)]
    for sampled in (False, True):
        recorder.active = sampled
        for i, micro_batch in enumerate(micro_batches):
            for member, gradient in enumerate(micro_batch):
                bucket.add(member, gradient, first=i == 0)
        bucket.launch()
        bucket.advance()
        bucket.finish()
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
