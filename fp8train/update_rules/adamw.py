"""AdamW over master weights (Loshchilov & Hutter 2019).

With gradient g (already multiplied by ``grad_multiplier``), step t counted from 1 and learning rate η::

    m <- β1·m + (1-β1)·g            v <- β2·v + (1-β2)·g²
    w <- w - η·λ·w - η · (m/(1-β1^t)) / (sqrt(v/(1-β2^t)) + ε)

v enters as it was computed, not as it will be stored, so ``v >= (1-β2)·g²``. That bounds nothing where this
step's gradient is small: a stored v that rounded to zero beside an m that did not, as may happen next to an
outlier in a block, would divide m by ε. Exact moments satisfy ``|m| <= c·sqrt(v)`` with
``c² = (1-β1)²/(1-β2) · (1-r^t)/(1-r)``, ``r = β1²/β2 < 1`` (Cauchy-Schwarz over the history; c tends to 1.17
at 0.9 and 0.95). So where moments are stored rounded, the root is of ``max(v, (m/c)²)``: no longer a step
than exact moments could make. What is stored is v. The bound is ours, not FP8-LM's, and can be turned off
(``bounded_update``).

Exact FP32 moments go through torch's fused kernel, one pass over memory instead of eight; rounded moments
need the bound, FP64 is what both are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8train.update_rules.rule import ALIGNMENT, Load, NewValues, Rule, RuleSettings, StepScalars

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdamWSettings(RuleSettings):
    """Hyper-parameters; ``eps`` is added to the root of the second moment; ``bounded_update``: where moments
    are stored rounded, no step is longer than one of exact moments could be."""

    eps: float
    bounded_update: bool = True


class AdamW(Rule):
    """AdamW with decoupled weight decay, two moments, and a bound on steps whose moments are stored rounded;
    the module has the formulas."""

    name = "adamw"
    summary = "Two moments, a step of about the learning rate."
    has_second_moment = True
    settings_type = AdamWSettings
    settings: AdamWSettings

    def _largest_ratio(self, step: int) -> float | None:
        """The largest ratio of |m| to sqrt(v) that exact moments can have after ``step`` steps, whatever the
        gradients; None where it has no limit."""
        s = self.settings
        ratio = s.beta1**2 / s.beta2 if s.beta2 else 1.0
        if ratio >= 1:
            return None
        return (1 - s.beta1) * ((1 - ratio**step) / ((1 - s.beta2) * (1 - ratio))) ** 0.5

    def _bound(self, scalars: StepScalars) -> float | None:
        """The ratio that this step's moments are held to; None for exact ones."""
        return self._largest_ratio(scalars.step) if scalars.rounded and self.settings.bounded_update else None

    def numbers(self, scalars: StepScalars) -> Mapping[str, float]:
        """The module's formulas in numbers of a kernel: divisors as reciprocals."""
        s, bound = self.settings, self._bound(scalars)
        return {
            "keep": 1 - scalars.decay,
            "step_size": -scalars.lr / (1 - s.beta1**scalars.step),
            "toward_first": 1 - s.beta1,
            "toward_second": 1 - s.beta2,
            "keep_second": s.beta2,
            "inv_correction2": 1 / (1 - s.beta2**scalars.step),
            "inv_bound": 0.0 if bound is None else 1 / bound,
            "eps": s.eps,
        }

    def new_values(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        """Yield both moments and the master weight; exact FP32 ones through the fused kernel."""
        in_fp64 = gradient.dtype.itemsize == 8
        if scalars.rounded or in_fp64:
            yield from self._by_formula(scalars, gradient, load)
            return
        m, v, w = load("exp_avg"), load("exp_avg_sq"), load("master")
        if scalars.decay:
            w.mul_(1 - scalars.decay)
        self._fused(scalars, w, gradient, m, v)
        yield from (("exp_avg_sq", v), ("exp_avg", m), ("master", w))

    def _fused(self, scalars: StepScalars, w: Tensor, gradient: Tensor, m: Tensor, v: Tensor) -> None:
        """The module's formulas in one pass, in place: flat FP32 of one length."""
        from torch import _fused_adamw_

        step = w.new_full((), scalars.step)
        for weight, grad, exp_avg, exp_avg_sq in _vectors(w, gradient, m, v):
            _fused_adamw_(
                [weight],
                [grad],
                [exp_avg],
                [exp_avg_sq],
                [],  # of amsgrad
                [step],
                lr=scalars.lr,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                weight_decay=0.0,
                eps=self.settings.eps,
                amsgrad=False,
                maximize=False,
            )

    def _by_formula(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        """The module's formulas one operation at a time: any type, and the bound on rounded moments. Each
        result is handed over as soon as it is there, so that few chunks are alive at once."""
        s = self.settings
        correction1, correction2 = 1 - s.beta1**scalars.step, 1 - s.beta2**scalars.step
        m = load("exp_avg").lerp_(gradient, 1 - s.beta1)  # β1·m + (1-β1)·g, in place
        v = load("exp_avg_sq").mul_(s.beta2).addcmul_(gradient, gradient, value=1 - s.beta2)
        del gradient
        # v from below where moments come back rounded: |m| / sqrt(v) stays what exact moments could have.
        bound = self._bound(scalars)
        floored = v if bound is None else v.maximum((m / bound).square_())
        denominator = (floored / correction2).sqrt_().add_(s.eps)
        del floored
        yield "exp_avg_sq", v  # stored as it was computed, without the bound
        del v
        w = load("master")
        if scalars.decay:
            w.mul_(1 - scalars.decay)
        # -η · (m / (1-β1^t)) / denominator; m as it was computed, not as it will be stored
        w.addcdiv_(m, denominator, value=-scalars.lr / correction1)
        del denominator
        yield "exp_avg", m
        del m
        yield "master", w


def _vectors(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length in pieces for a kernel that updates them in place: all but a tail of less
    than 64 elements, and that tail padded with zeros, whose results are copied back.

    On CPUs the kernel computes the last few elements of a call without vector instructions, and may round
    them differently; where a tensor is cut must not matter.
    """
    numel = tensors[0].numel()
    whole = numel if tensors[0].device.type != "cpu" else numel - numel % ALIGNMENT
    if whole:
        yield tuple(tensor[:whole] for tensor in tensors)
    if whole == numel:
        return
    tails = tuple(tensor[whole:] for tensor in tensors)
    padded = tuple(tail.new_zeros(ALIGNMENT) for tail in tails)
    for tail, whole_vector in zip(tails, padded, strict=True):
        whole_vector[: len(tail)] = tail
    yield padded
    for tail, result in zip(tails, padded, strict=True):
        tail.copy_(result[: len(tail)])


RULE = AdamW
