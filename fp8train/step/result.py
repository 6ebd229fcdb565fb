"""What a step did, for the loop and the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Skipped = Literal["", "no_targets", "not_finite", "spike", "guard"]
"""Why a step was not applied; empty if it was."""


@dataclass(frozen=True)
class StepEvent:
    """Something that a person should know of a step.

    Attributes:
        kind: as in events.jsonl.
        text: one sentence for the console.
        fields: numbers and names, as JSON values.
    """

    kind: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewind:
    """The wish to return to the newest checkpoint.

    Attributes:
        cause: what for, in words.
        skip_data: leave out the data of the last steps.
        pinned: linears that stay out of FP8, and until which step.
    """

    cause: str
    skip_data: bool
    pinned: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: global mean loss in nats per token, device scalar; NaN without a target token.
        grad_norm: norm before clipping, host number, of the gradients of effective weights
            (:meth:`~fp8train.models.parametrization.Parametrization.norm_weight`).
        lr: learning rate used.
        skipped: why the step was not applied: loss or gradient were not finite, the global batch had no
            target token, they jumped (``spikes.action``), or ``precision.guard`` said so. Nothing was changed
            then, but for what ``partly`` says.
        partly: whether a step that was not applied changed some parameters before its gradient stopped being
            finite; only with ``train.gradient_release``.
        events: what stood out.
        rewind: the run is to go on from a checkpoint.
    """

    loss: Tensor
    grad_norm: float
    lr: float
    skipped: Skipped = ""
    partly: bool = False
    events: tuple[StepEvent, ...] = ()
    rewind: Rewind | None = None

    @property
    def applied(self) -> bool:
        """Whether the step changed the weights as a whole."""
        return not self.skipped

    @property
    def no_targets(self) -> bool:
        """Whether the global batch had no target token."""
        return self.skipped == "no_targets"
