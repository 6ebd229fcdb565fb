"""Scale state of gradients: what one step's gradients tell the next one's.

The trainer walks through the same moments whatever the reduction: ``begin_step`` freezes the state for the
step's payloads, ``end_step`` agrees on what the ranks saw, ``must_repeat`` says whether the step's scales did
not fit its gradients, and ``commit``, only after an applied step, moves on. :class:`NoScales` is for
reductions whose scales are in the payload; :mod:`fp8train.parallel.gradients.auto_scales` and
:mod:`fp8train.parallel.gradients.grids` are the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from fp8train.comm.collectives import CountedGroup


class GradientScales(Protocol):
    """What a reduction remembers from one step to the next, and when it may change; the module tells the
    order of calls.

    Attributes:
        name: of the reduction that the state belongs to; in checkpoints.
    """

    name: str

    def begin_step(self) -> None:
        """Freeze the state: what holds now holds for all micro-batches of the step."""
        ...

    def end_step(self) -> None:
        """Agree with the other ranks on what the step's gradients, which are reduced now, did with the
        scales."""
        ...

    def must_repeat(self) -> bool:
        """Return whether the step must be run again, with scales that fit; the same on all ranks."""
        ...

    def commit(self) -> None:
        """Move the state on: the step was applied."""
        ...

    def state_tensors(self) -> Mapping[str, Tensor]:
        """The state's tensors for checkpoints, equal on all ranks; they are filled in place, then
        :meth:`restored` is called."""
        ...

    def restored(self) -> None:
        """Take note that :meth:`state_tensors` were filled from a checkpoint."""
        ...

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """``fp8/...`` numbers for the log; waits for the device. ``stages``: ranks with the other
        parameters."""
        ...


class NoScales:
    """Scale state of reductions whose payload carries its scales: nothing is remembered from step to step."""

    name = "stateless"

    def begin_step(self) -> None:
        """Do nothing: there is no state."""

    def end_step(self) -> None:
        """Do nothing: there is nothing to agree on."""

    def must_repeat(self) -> bool:
        """Return False: scales that are made with the payload always fit it."""
        return False

    def commit(self) -> None:
        """Do nothing: there is no state."""

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Return no tensors: checkpoints hold nothing of it."""
        return {}

    def restored(self) -> None:
        """Do nothing: there is no state."""

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """Return no metrics: there is nothing to tell."""
        return {}
