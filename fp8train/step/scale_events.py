"""Amaxes that gave no delayed scale: zeros and infinities, by name, as often as something is logged.

:class:`~fp8train.numerics.scale_state.ScaleState` counts, for each slot, the steps whose amax was zero (the
scale stays: a gradient that vanished) or not finite (the step is skipped). Here the counts of all pipeline
stages are put together and compared with those of the last time, on logged steps only: they stay on the
device otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.numerics.scale_state import ScaleState, named_events

SHOWN = 8
"""Most slots that an event names."""


class ScaleEvents:
    """Tells which delayed scales met a zero or non-finite amax since it was last asked."""

    def __init__(
        self, names: list[str], scales: ScaleState | None, stages: CountedGroup, device: torch.device
    ) -> None:
        """Start from what ``scales`` has counted so far.

        Args:
            names: slots of the whole model.
            scales: those of this rank's stages.
            stages: ranks with the other stages.
            device: where the counts are.
        """
        self._names, self._scales, self._stages, self._device = names, scales, stages, device
        position = {name: i for i, name in enumerate(names)}
        held = [] if scales is None else [position[name] for name in scales.names]
        self._held = torch.tensor(held, dtype=torch.int64, device=device)
        self._seen = torch.zeros(len(names), 2, dtype=torch.int64)

    def _counts(self) -> Tensor:
        counts = torch.zeros(len(self._names), 2, dtype=torch.int64, device=self._device)
        if self._scales is not None:
            counts[self._held] = self._scales.events
        self._stages.all_reduce(counts, purpose="statistics")()
        return counts.cpu()

    def forget(self) -> None:
        """Take what was counted until now as not new (it came from a checkpoint). Collective over the
        stages."""
        self._seen = self._counts()

    def take(self) -> dict[str, dict[str, int]]:
        """``{slot: {"zero": steps, "non_finite": steps}}`` since the last call; waits for the device.
        Collective over the stages."""
        counts = self._counts()
        new, self._seen = counts - self._seen, counts
        return named_events(self._names, new)


def event_metrics(events: dict[str, dict[str, int]]) -> dict[str, float]:
    """Number of events of each kind, as metrics: slots times steps."""
    return {
        "fp8/zero_amaxes": float(sum(counts["zero"] for counts in events.values())),
        "fp8/non_finite_amaxes": float(sum(counts["non_finite"] for counts in events.values())),
    }
