"""The grid of squared sums under ``exact`` holds every gradient: no sum leaves 62 bits."""

from __future__ import annotations

import math

import torch

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.buckets import Member
from fp8train.parallel.exact import ExactFixedPointBucket, GridScales


def test_a_gradient_above_its_fp32_amax_stays_on_the_grid_of_squares() -> None:
    """A number just above √2 in FP64 is below √2 in FP32. The squares of two such elements add up to more
    than a power of two, where a bound from the FP32 amax says that they do not reach it."""
    gradient = torch.full((2,), math.sqrt(2) + 1e-8, dtype=torch.float64)
    assert float(gradient[0].float()) < math.sqrt(2) < float(gradient[0])
    device, group = torch.device("cpu"), CountedGroup(None)
    scales = GridScales([False], [2], micro_batches=1, group=group, device=device)
    bucket = ExactFixedPointBucket(
        [Member("gain", (2,))], scales=scales, parameters=[0], group=group, contributions=1, device=device
    )
    scales.calibrating = True
    for calibrating in (True, False):
        scales.calibrating = calibrating
        scales.begin_step()
        bucket.add(0, gradient, first=True)
        if calibrating:
            scales.agree()
            scales.commit()
    bucket.launch()
    bucket.finish()
    scales.agree()
    integers = [int(x) for x in bucket.buffer(0).flatten()]
    shift = int(scales.square_shifts[0])
    assert shift > 0
    assert sum(x * x for x in integers) < 2 ** (62 + shift), f"shift {shift} for {integers}"
