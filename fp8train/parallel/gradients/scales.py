"""Scale state of gradients: what one step's gradients tell the next one's.

The trainer walks through the same moments whatever the reduction: ``begin_step`` freezes the state for the
step's payloads, ``end_step`` agrees on what the ranks saw, ``must_repeat`` says whether the step's scales did
not fit its gradients, and ``commit``, only after an applied step, moves on. :class:`GradientScales` itself is
for reductions whose scales are in the payload; :mod:`fp8train.parallel.gradients.auto_scales` and
:mod:`fp8train.parallel.gradients.grids` remember something.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fp8train.comm.collectives import CountedGroup


class GradientScales:
    """What a reduction remembers from one step to the next, here nothing, and when it may change; the module
    tells the order of calls.

    Attributes:
        name: of the reduction that the state belongs to; in checkpoints.
    """

    name = "stateless"

    def begin_step(self) -> None:
        """Freeze the state: what holds now holds for all micro-batches of the step."""

    def end_step(self) -> None:
        """Agree with the other ranks on what the step's gradients, which are reduced now, did with the
        scales."""

    def must_repeat(self) -> bool:
        """Return whether the step must be run again, with scales that fit; the same on all ranks."""
        return False

    def commit(self) -> None:
        """Move the state on: the step was applied."""

    def state_tensors(self) -> Mapping[str, Tensor]:
        """The state's tensors for checkpoints, equal on all ranks; they are filled in place, and what the
        next step freezes follows from them."""
        return {}

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """``fp8/...`` numbers for the log; waits for the device. ``stages``: ranks with the other
        parameters."""
        return {}
