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
    """See the module.

    Attributes:
        name: of the reduction that the state belongs to; in checkpoints.
    """

    name: str

    def begin_step(self) -> None:
        """Micro-batches of a step are about to arrive: what holds now holds for all of it."""
        ...

    def end_step(self) -> None:
        """The step's gradients are reduced."""
        ...

    def must_repeat(self) -> bool:
        """Whether the step must be run again, with scales that fit; the same on all ranks."""
        ...

    def commit(self) -> None:
        """The step was applied."""
        ...

    def state_tensors(self) -> Mapping[str, Tensor]:
        """For checkpoints, equal on all ranks; filled in place, then :meth:`restored`."""
        ...

    def restored(self) -> None:
        """:meth:`state_tensors` were filled."""
        ...

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """``fp8/...`` numbers; waits for the device. ``stages``: ranks with the other parameters."""
        ...


class NoScales:
    """Nothing is remembered."""

    name = "stateless"

    def begin_step(self) -> None:
        """See :class:`GradientScales`."""

    def end_step(self) -> None:
        """See :class:`GradientScales`."""

    def must_repeat(self) -> bool:
        """Never."""
        return False

    def commit(self) -> None:
        """See :class:`GradientScales`."""

    def state_tensors(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def restored(self) -> None:
        """See :class:`GradientScales`."""

    def metrics(self, stages: CountedGroup) -> dict[str, float]:
        """None."""
        return {}
