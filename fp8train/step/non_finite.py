"""Steps that are skipped: where it is decided what NaN and infinity do to a run.

Nothing on the way hides them. A cast whose source is not finite has a scale_inv of NaN
(:mod:`fp8train.numerics.scale`), sums over ranks keep it, and so the norm of all gradients, which every rank
has, is not finite. Here the step is skipped then, on all ranks together; so is one without targets, which has
no gradient. Delayed scales keep what they were and count it (:mod:`fp8train.step.scale_events`), the guard
may take a linear out of FP8 (:mod:`fp8train.step.guard`), and :mod:`fp8train.step.attribution` says on which
rank it began. A run that skips too many steps in a row, for whatever reason, ends here.
"""

from __future__ import annotations

from fp8train.config.errors import UserError
from fp8train.step.result import StepResult


class DivergedError(UserError):
    """Loss or gradients stayed non-finite, or out of range; the last checkpoint is from before."""

    exit_status = 3


class NoTargetsError(UserError):
    """The data has nothing to learn from for many steps."""


class SkippedSteps:
    """Counts the steps in a row that were skipped."""

    def __init__(self, most: int) -> None:
        """Begin to count; ``most`` is ``train.max_skipped_steps``."""
        self._most = most
        self._in_a_row = self._partly = 0

    def forget(self) -> None:
        """Begin anew: the run went back to a checkpoint."""
        self._in_a_row = self._partly = 0

    def count(self, done: int, result: StepResult) -> None:
        """Count step ``done`` (1-based).

        Raises:
            DivergedError: it is the last of too many; its loss or gradient was not finite, or jumped.
            NoTargetsError: likewise, but it had no target token.
        """
        self._in_a_row = 0 if result.applied else self._in_a_row + 1
        self._partly = 0 if result.applied else self._partly + result.partly
        if self._in_a_row < self._most:
            return
        many = f"{self._most} steps in a row were skipped" if self._most > 1 else "it was skipped"
        weights = f"the weights are those of step {done - self._most}"
        limit = f"train.max_skipped_steps: {self._most}"
        if result.no_targets:
            raise NoTargetsError(
                f"step {done}: {many} ({limit}), the last one because its global batch had no target token; "
                f"{weights}\n"
                "check what the data leaves out of the loss: data.kind: sft trains on answers only, and "
                "conversations that are cut at data.seq_length may end before theirs"
            )
        if self._partly:
            weights = (
                f"{self._partly} of them were taken down to the layer where that began "
                f"(train.gradient_release), so the weights are those of no whole step"
            )
        why, remedy = _REASONS[result.skipped]
        raise DivergedError(f"step {done}: {many} ({limit}), the last one because {why}; {weights}\n{remedy}")


_LOWER = "resume from a checkpoint with a lower optimizer.lr"
_REASONS = {
    "not_finite": ("loss or gradient were not finite", f"{_LOWER}; events.jsonl says where that began"),
    "spike": (
        "loss or gradient norm jumped",
        f"{_LOWER}, or write spikes.action=warn if what was usual before is not any more",
    ),
    "guard": (
        "precision.guard found a linear out of its range",
        f"{_LOWER}, or write precision.guard.action=report; events.jsonl names the linear",
    ),
}
