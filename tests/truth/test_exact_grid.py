"""The grid of squared sums under ``exact`` holds every gradient: no sum leaves 62 bits."""

from __future__ import annotations

import math

import torch

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.buckets import Member
from fp8train.parallel.exact import ExactFixedPointBucket, GridScales


def test_a_gradient_above_its_fp32_amax_stays_on_the_grid_of_squares() -> None:
    """√2 in FP64 is above √2 in FP32. Two elements of it have squares of 4 grid units², which no longer fit
    where a bound from the FP32 amax, just below, says that they do."""
    gradient = torch.full((2,), math.sqrt(2), dtype=torch.float64)
    gradient = gradient.nextafter(torch.tensor(2.0, dtype=torch.float64))
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
