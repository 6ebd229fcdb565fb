"""Where the auto-scaling factor of gradients starts, for a number of ranks that is only said."""

from __future__ import annotations

import pytest
import torch

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.gradients.auto_scales import AutoScales
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets, Groups
from fp8train.precision.gradients import Fp8Gradients, Gradients
from fp8train.precision.number_formats import E4M3


@pytest.mark.parametrize(
    ("fp8", "expected"),
    [
        (Fp8Gradients(reduce="shared_scale"), 1 / 9),
        (Fp8Gradients(reduce="shared_scale", mu_initial="one_over_root_ranks"), 1 / 3),
        (Fp8Gradients(reduce="shared_scale", mu_initial="one"), 1.0),
    ],
)
def test_mu_of_nine_ranks(fp8: Fp8Gradients, expected: float) -> None:
    group = CountedGroup(None)
    group.size = 9
    plan = GradientBuckets(
        {"w": torch.zeros(4, 4)},
        Gradients(bucket_mib=2**-10, format=E4M3, fp8=fp8),
        groups=Groups(group),
        device=torch.device("cpu"),
        in_fp8_plan=["w"],
        contributions=1,
    )
    assert isinstance(plan.scales, AutoScales)
    assert plan.scales.controller.mu.tolist() == pytest.approx([expected])
