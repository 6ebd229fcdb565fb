"""One update of AdamW and of Lion in FP64, from the papers: what a gradient should have become.

AdamW: Loshchilov & Hutter 2019, algorithm 2, with the learning rate in the decay as torch has it. Lion: Chen
et al. 2023 (arXiv 2302.06675), algorithm 2. The one thing of ours in AdamW is the bound on a step where
moments come back rounded: by Cauchy-Schwarz no gradient history of t steps has ``m² > c²·v`` with the c² of
:func:`largest_ratio`, so a stored v below that is a rounding and the bound replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

States = Mapping[str, Tensor]
"""FP64 by role: ``master``, ``exp_avg`` and for AdamW ``exp_avg_sq``."""


@dataclass(frozen=True)
class Rule:
    """Hyper-parameters. ``eps`` in the units of the gradients given."""

    name: str
    lr: float
    beta1: float
    beta2: float
    eps: float


def updated(
    rule: Rule, gradient: Tensor, old: States, *, step: int, lr: float, decay: float, rounded: bool
) -> dict[str, Tensor]:
    """New states.

    Args:
        rule: the update rule.
        gradient: clipped, FP64.
        old: states before.
        step: 1-based count of updates.
        lr: learning rate of this step and parameter.
        decay: share of the weight that the step removes.
        rounded: whether moments were stored rounded.
    """
    g, w, m = gradient, old["master"] * (1 - decay), old["exp_avg"]
    if rule.name == "lion":
        direction = (rule.beta1 * m + (1 - rule.beta1) * g).sign()
        return {"exp_avg": rule.beta2 * m + (1 - rule.beta2) * g, "master": w - lr * direction}
    m = rule.beta1 * m + (1 - rule.beta1) * g
    v = rule.beta2 * old["exp_avg_sq"] + (1 - rule.beta2) * g * g
    bounded = v.maximum(m * m / largest_ratio(rule, step) ** 2) if rounded else v
    m_hat, v_hat = m / (1 - rule.beta1**step), bounded / (1 - rule.beta2**step)
    return {"exp_avg": m, "exp_avg_sq": v, "master": w - lr * m_hat / (v_hat.sqrt() + rule.eps)}


def largest_ratio(rule: Rule, step: int) -> float:
    """The largest |m| / sqrt(v) of any ``step`` gradients. With ``m = Σ (1-β1)·β1^i·g_i`` and
    ``v = Σ (1-β2)·β2^i·g_i²``, Cauchy-Schwarz gives ``m² <= v · Σ (1-β1)²·β1^(2i) / ((1-β2)·β2^i)``."""
    terms = ((rule.beta1**2 / rule.beta2) ** i for i in range(step))
    return math.sqrt((1 - rule.beta1) ** 2 / (1 - rule.beta2) * sum(terms))


def cosine(step: int, total: int, *, lowest: float) -> float:
    """The schedule's factor at 0-based ``step``, without warm-up; the last step has ``lowest``."""
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * (step + 1) / total)) / 2
