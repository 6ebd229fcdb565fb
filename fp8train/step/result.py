"""What a step did, for the loop and the log."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: global mean loss in nats per token, device scalar.
        grad_norm: norm before clipping, host number, of the gradients of effective weights
            (:meth:`~fp8train.models.parametrization.Parametrization.norm_weight`).
        lr: learning rate used.
        applied: False if the step was skipped: its gradient was not finite, or there was none. Nothing was
            changed then, but for what ``partly`` says.
        no_targets: whether the global batch had no target token, so that there was no gradient; the loss is
            NaN then.
        partly: whether a step that was not applied changed some parameters before its gradient stopped being
            finite; only with ``train.gradient_release``.
    """

    loss: Tensor
    grad_norm: float
    lr: float
    applied: bool
    no_targets: bool = False
    partly: bool = False
