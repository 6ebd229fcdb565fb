"""Where the auto-scaling factor of a gradient plan starts, for a number of ranks that is only said."""

from __future__ import annotations

import pytest
import torch

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.gradients.auto_scales import AutoScales
from fp8train.parallel.gradients.plan import Fp8Gradients, GradientPlan, Groups


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
    plan = GradientPlan(
        {"w": torch.zeros(4, 4)},
        accumulate=torch.float32,
        reduce=torch.float32,
        bucket_bytes=1024,
        groups=Groups(group),
        device=torch.device("cpu"),
        fp8=fp8,
        in_fp8_plan=["w"],
        contributions=1,
    )
    assert isinstance(plan.scales, AutoScales)
    assert plan.scales.controller.mu.tolist() == pytest.approx([expected])
