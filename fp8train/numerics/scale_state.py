"""Delayed scales: what the amaxes of past optimizer steps say about the next one.

A *slot* is one cast of one linear: (FQN, operand use). Within a step every cast of a slot uses the same scale
and adds its amax to the slot's running maximum. At the optimizer step, with ``A_t`` the maximum over the
step's micro-batches and over all ranks (one MAX all-reduce of one flat tensor), :meth:`ScaleState.advance`
does, for each slot::

    A_t = 0 or not finite:   keep history and scale, count the event
    otherwise:               history <- A_t, A_(t-1), .. A_(t-history+1)   (usable amaxes only)
                             scale   <- scale_from_amax(max(history) or A_t)   at every ``interval``-th step

A scale is thus always finite and positive. (MS-AMP computes the exponent of an infinite amax and so inverts
the scale it meant to keep; see FP8-LM's code, ``common/tensor/meta.py``.)

**Nothing else moves a scale.** Amaxes are recorded only inside :meth:`ScaleState.recording`, which the
training step opens; evaluation and generation read scales and write nothing. Recomputation in backward sees
the scales of its forward, because they are constant during the step, and records the same amax again, which
a maximum does not notice. So micro-batch order, pipeline schedule and activation checkpointing change
nothing.

**Warm-up.** Until a slot has one usable amax its stored scale is 0, which stands for "none", and each tensor
is scaled by its own amax (current scaling). That depends on nothing but the tensor, so the first step does
not depend on the order of its micro-batches either. (MS-AMP stays in current scaling until its window of 16
steps is full, which changes what is trained in the steps that tell least; one usable amax is enough here.)

**Saturation.** A tensor that outgrew its delayed scale saturates; :mod:`fp8train.numerics.statistics` counts
how many elements do. A tensor that holds NaN or infinity still makes its product NaN (its ``scale_inv``), so
such a step is skipped and the scales stay.

Everything is a device tensor, and nothing but :func:`named_events` waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fp8train.numerics.scale import scale_from_amax
from fp8train.precision.operand_cast import QuantSpec

_PREFIX = "scale_state"


class ScaleSlot(NamedTuple):
    """One slot as casts see it: FP32 scalars, views of the state.

    ``scale`` is 0 during warm-up. ``amax`` is the running maximum to add to; None where nothing is recorded.
    """

    scale: Tensor
    amax: Tensor | None


def record_amax(amax: Tensor, running: Tensor) -> None:
    """``running <- max(running, amax)``; NaN counts as infinity, which every MAX all-reduce hands on."""
    running.copy_(torch.maximum(running, torch.where(torch.isnan(amax), torch.inf, amax)))


def named_events(names: Sequence[str], counts: Tensor) -> dict[str, dict[str, int]]:
    """``{slot: {"zero": steps, "non_finite": steps}}`` of the slots with events, from counts as in
    :attr:`ScaleState.events`. Waits for the device."""
    return {
        name: {"zero": zero, "non_finite": non_finite}
        for name, (zero, non_finite) in zip(names, counts.tolist(), strict=True)
        if zero or non_finite
    }


class ScaleState:
    """Amaxes, histories and scales of all delayed casts of a model.

    Attributes:
        names: slots, ``{fqn}/{use}``, e.g. ``layers.0.mlp.up/grad_input.grad_output``.
        active: whether casts record their amax now; see :meth:`recording`.
        amaxes: FP32 [slots], running maxima of the current step.
        amax_history: FP32 [slots, longest history], newest first, 0 where empty.
        scales: FP32 [slots], 0 where a slot is warming up.
        events: int64 [slots, 2], steps whose amax was zero and steps whose amax was not finite.
        steps: int64 [1], steps that :meth:`advance` applied.
    """

    def __init__(self, slots: Mapping[str, QuantSpec], device: torch.device) -> None:
        """Args: ``slots``: name -> spec, all ``delayed``; ``device``: where the state lives.

        Raises:
            ValueError: a spec is not ``delayed``.
        """
        for name, spec in slots.items():
            if spec.scale_source != "delayed":
                raise ValueError(f"{name}: {spec} keeps no scale state; only scale_source: delayed does")
        specs = list(dict.fromkeys(slots.values()))
        # Slots of one spec are neighbours, so a step is a few vector operations per distinct spec.
        ordered = sorted(slots.items(), key=lambda item: specs.index(item[1]))
        self.names = [name for name, _ in ordered]
        self._specs = [spec for _, spec in ordered]
        self._index = {name: i for i, name in enumerate(self.names)}
        self._ranges: list[tuple[QuantSpec, slice]] = []
        for spec in specs:
            start = self._specs.index(spec)
            self._ranges.append((spec, slice(start, start + self._specs.count(spec))))
        count, longest = len(ordered), max((spec.history for spec in specs), default=1)
        self.active = False
        self.amaxes = torch.zeros(count, device=device)
        self.amax_history = torch.zeros(count, longest, device=device)
        self.scales = torch.zeros(count, device=device)
        self.events = torch.zeros(count, 2, dtype=torch.int64, device=device)
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)

    def slot(self, name: str, *, record: bool) -> ScaleSlot:
        """Views of one slot; ``record``: with its running maximum."""
        i = self._index[name]
        return ScaleSlot(self.scales[i], self.amaxes[i] if record else None)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forward and backward of all micro-batches of one optimizer step run inside; casts record amaxes.

        Entering forgets what an unfinished or skipped step recorded, so enter once per step.
        """
        self.amaxes.zero_()
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def forget(self, linears: Sequence[str], *, keep: str) -> None:
        """Make the slots of these linears as if they had never seen an amax, but for uses that end in
        ``keep``; none waits for the device."""
        for name, i in self._index.items():
            if name.rpartition("/")[0] in linears and not name.endswith(keep):
                self.scales[i].zero_()
                self.amax_history[i].zero_()

    @torch.no_grad()
    def advance(self, all_reduce_max: Callable[[Tensor], None], *, applied: bool) -> None:
        """Move to the next step's scales: the rule of the module docstring.

        Call it once per optimizer step on every rank, after the last backward and *before* the optimizer
        writes weights: the weights' own scales are among these, and a restored run writes them with what
        the checkpoint holds.

        Args:
            all_reduce_max: replaces an FP32 tensor by its elementwise maximum over the ranks, in place.
            applied: False for a skipped step: events are counted, scales and history stay.
        """
        if not self.names:
            return
        all_reduce_max(self.amaxes)
        finite = torch.isfinite(self.amaxes)
        self.events.add_(torch.stack((self.amaxes == 0, ~finite), dim=1))
        if not applied:
            return
        usable = finite & (self.amaxes > 0)
        for spec, slots in self._ranges:
            self._advance_slots(spec, slots, usable[slots])
        self.steps.add_(1)

    def _advance_slots(self, spec: QuantSpec, slots: slice, usable: Tensor) -> None:
        history, scales = self.amax_history[slots, : spec.history], self.scales[slots]
        shifted = torch.cat((self.amaxes[slots, None], history[:, :-1]), dim=1)
        history.copy_(torch.where(usable[:, None], shifted, history))
        amax = history.amax(dim=1) if spec.reduce == "max" else history[:, 0]
        due = (self.steps % spec.interval == 0) | (scales == 0)
        scales.copy_(torch.where(due & usable, scale_from_amax(amax, spec)[0], scales))

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs, by slot (views: loading writes into them).

        ``scale_state/amax_history/{slot}`` FP32 [history], ``scale_state/scale/{slot}`` FP32 [1],
        ``scale_state/events/{slot}`` int64 [2] and ``scale_state/steps`` int64 [1]; empty without slots. The
        running maxima are not among them: a checkpoint is written between steps.
        """
        tensors = {f"{_PREFIX}/steps": self.steps} if self.names else {}
        for i, (name, spec) in enumerate(zip(self.names, self._specs, strict=True)):
            tensors[f"{_PREFIX}/amax_history/{name}"] = self.amax_history[i, : spec.history]
            tensors[f"{_PREFIX}/scale/{name}"] = self.scales[i : i + 1]
            tensors[f"{_PREFIX}/events/{name}"] = self.events[i]
        return tensors
