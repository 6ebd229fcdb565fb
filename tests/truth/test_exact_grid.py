"""The grid of squared sums under ``exact`` holds every gradient: no sum leaves 62 bits."""

from __future__ import annotations

import math

import torch

from fp8train.parallel.gradients.integer_storage import FixedPoints
from tests.parallel.gradients.test_integers import bucket_of, run_pass


def test_a_gradient_above_its_fp32_amax_stays_on_the_grid_of_squares() -> None:
    """A number just above √2 in FP64 is below √2 in FP32. The squares of two such elements add up to more
    than a power of two, where a bound from the FP32 amax says that they do not reach it."""
    gradient = torch.full((2,), math.sqrt(2) + 1e-8, dtype=torch.float64)
    assert float(gradient[0].float()) < math.sqrt(2) < float(gradient[0])
    bucket, scales = bucket_of(FixedPoints, 1, shapes=[(2,)])
    run_pass(bucket, scales, [[gradient]])
    assert scales.must_repeat(), "the first step has no grid"
    run_pass(bucket, scales, [[gradient]])
    integers = [int(x) for x in bucket.storage.buffer(0).flatten()]
    shift = int(scales.step.square_shifts[0])
    assert shift > 0
    assert sum(x * x for x in integers) < 2 ** (62 + shift), f"shift {shift} for {integers}"
