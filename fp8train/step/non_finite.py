"""Steps that are skipped: where it is decided what NaN and infinity do to a run.

Nothing on the way hides them. A cast whose source is not finite has a scale_inv of NaN
(:mod:`fp8train.numerics.scale`), sums over ranks keep it, and so the norm of all gradients, which every rank
has, is not finite. Here the step is skipped then, on all ranks together; so is one without targets, which has
no gradient. Delayed scales keep what they were and count it (:mod:`fp8train.step.scale_events`), the guard
may take a linear out of FP8 (:mod:`fp8train.step.guard`). A run that skips too many steps ends here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8train.config.errors import UserError
from fp8train.step.result import StepResult

MAX_SKIPPED = 20


class DivergedError(UserError):
    """Gradients stayed non-finite; the last checkpoint is from before."""

    exit_status = 3


class NoTargetsError(UserError):
    """The data has nothing to learn from for many steps."""


def norm_and_whether_applied(norm: Tensor, num_targets: Tensor | int) -> tuple[float, bool]:
    """The norm of all reduced gradients, a scalar, and whether the step changes anything: the norm is finite,
    and the global batch has target tokens. The same on all ranks; waits for the device, once."""
    if isinstance(num_targets, int):
        value, count = float(norm), float(num_targets)
    else:
        value, count = torch.stack((norm.double(), num_targets.double())).tolist()
    return value, math.isfinite(value) and count > 0


class SkippedSteps:
    """Counts the steps in a row that were skipped."""

    def __init__(self) -> None:
        self._in_a_row = self._partly = 0

    def count(self, done: int, result: StepResult) -> None:
        """Count step ``done`` (1-based).

        Raises:
            DivergedError: it is the last of too many; its gradient was not finite.
            NoTargetsError: likewise, but it had no target token.
        """
        self._in_a_row = 0 if result.applied else self._in_a_row + 1
        self._partly = 0 if result.applied else self._partly + result.partly
        if self._in_a_row < MAX_SKIPPED:
            return
        if result.no_targets:
            raise NoTargetsError(
                f"step {done}: {MAX_SKIPPED} steps in a row were skipped, the last one because its global "
                f"batch had no target token; the weights are those of step {done - MAX_SKIPPED}\n"
                "check what the data leaves out of the loss: data.kind: sft trains on answers only, and "
                "conversations that are cut at data.seq_length may end before theirs"
            )
        weights = f"the weights are those of step {done - MAX_SKIPPED}"
        if self._partly:
            weights = (
                f"{self._partly} of them were taken down to the layer where that began "
                f"(train.gradient_release), so the weights are those of no whole step"
            )
        raise DivergedError(
            f"step {done}: gradients were not finite for {MAX_SKIPPED} steps in a row; {weights}\n"
            "resume from a checkpoint with a lower optimizer.lr; casts.jsonl may show the tensor"
        )
