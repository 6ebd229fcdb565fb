"""Lion: the sign of a momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

With gradient g (already multiplied by ``grad_multiplier``) and learning rate η::

    w <- w - η·λ·w - η · sign(β1·m + (1-β1)·g)
    m <- β2·m + (1-β2)·g

One moment, and only signs are taken of it: no second moment to flush, and a common factor on all gradients
changes nothing. The usual β1 = 0.9, β2 = 0.99 goes with a rate 3 to 10 times smaller than AdamW's and a
weight decay as much larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fp8train.update_rules.rule import Load, NewValues, Rule, StepScalars

if TYPE_CHECKING:
    from torch import Tensor


class Lion(Rule):
    """Lion: one moment, and a step of constant size against the sign of its mean with the gradient; the
    module has the formulas."""

    name = "lion"
    summary = "No second moment; takes a third to a tenth of AdamW's learning rate."
    has_second_moment = False

    def numbers(self, scalars: StepScalars) -> Mapping[str, float]:
        """The module's formulas in numbers of a kernel."""
        return {
            "keep": 1 - scalars.decay,
            "step_size": -scalars.lr,
            "toward_first": 1 - self.settings.beta1,
            "toward_second": 1 - self.settings.beta2,
        }

    def new_values(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        """Yield the moment and the master weight, which moved against a sign."""
        s = self.settings
        m = load("exp_avg")
        direction = m.lerp(gradient, 1 - s.beta1).sign_()
        m.lerp_(gradient, 1 - s.beta2)
        del gradient
        yield "exp_avg", m
        del m
        w = load("master")
        if scalars.decay:
            w.mul_(1 - scalars.decay)
        w.add_(direction, alpha=-scalars.lr)
        del direction
        yield "master", w


RULE = Lion
