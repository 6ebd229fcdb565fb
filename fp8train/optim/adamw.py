"""AdamW over master weights (Loshchilov & Hutter 2019).

With gradient g (already multiplied by ``grad_multiplier``), step t counted from 1 and learning rate η::

    m <- β1·m + (1-β1)·g            v <- β2·v + (1-β2)·g²
    w <- w - η·λ·w - η · (m/(1-β1^t)) / (sqrt(v/(1-β2^t)) + ε)

Because v enters as it was computed, not as it will be stored, ``v >= (1-β2)·g²``: a second moment that was
flushed to zero makes a step too long, never infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp8train.optim.optimizer import Load, NewValues, Optimizer, OptimizerSettings, StepScalars


@dataclass(frozen=True)
class AdamWSettings(OptimizerSettings):
    """Hyper-parameters; ``eps`` is added to the root of the second moment."""

    eps: float


class AdamW(Optimizer):
    """See the module."""

    name = "adamw"
    roles = ("master", "exp_avg", "exp_avg_sq")
    settings: AdamWSettings

    def _new_values(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        s = self.settings
        correction1, correction2 = 1 - s.beta1**scalars.step, 1 - s.beta2**scalars.step
        m = load("exp_avg").lerp_(gradient, 1 - s.beta1)
        v = load("exp_avg_sq").mul_(s.beta2).addcmul_(gradient, gradient, value=1 - s.beta2)
        del gradient
        denominator = (v / correction2).sqrt_().add_(s.eps)
        yield "exp_avg_sq", v
        del v
        w = load("master")
        if scalars.decay:
            w.mul_(1 - scalars.decay)
        w.addcdiv_(m, denominator, value=-scalars.lr / correction1)
        del denominator
        yield "exp_avg", m
        del m
        yield "master", w
