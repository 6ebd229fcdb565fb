"""What becomes of a step once its loss and gradient norm are known: applied, skipped, or the run goes back.

Every rank decides for itself, from numbers that all ranks share (:mod:`fp8train.step.spikes`,
:mod:`fp8train.step.guard`), so they decide alike; nothing is sent for it but the readings of the guard on
sampled steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fp8train.run_dir.metrics import strict
from fp8train.step.guard import Flag
from fp8train.step.monitors import Monitors
from fp8train.step.result import Rewind, Skipped, StepEvent
from fp8train.step.spikes import Spike


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a step; see :class:`~fp8train.step.result.StepResult`."""

    skipped: Skipped
    events: tuple[StepEvent, ...]
    rewind: Rewind | None


def judge(
    monitors: Monitors, done: int, *, loss: float, grad_norm: float, num_targets: float, late: bool = False
) -> Verdict:
    """Decide about step ``done`` (1-based). Collective over all ranks on sampled steps with a guard.

    Args:
        monitors: learn from the step.
        done: the step.
        loss: global mean, nats per token.
        grad_norm: of the reduced gradients.
        num_targets: target tokens of the global batch.
        late: the update is done; skipping is only what it did by itself, for a gradient that is not finite.
    """
    skipped: Skipped = ""
    events: list[StepEvent] = []
    rewind: Rewind | None = None
    spike: Spike | None = None
    if num_targets == 0:
        skipped = "no_targets"
    elif not (math.isfinite(grad_norm) and (late or math.isfinite(loss))):
        skipped = "not_finite"
    elif monitors.spikes is not None and math.isfinite(loss):
        spike = monitors.spikes.judge(done, loss=loss, grad_norm=grad_norm)
    if spike is not None and monitors.spikes is not None:
        action = monitors.spikes.config.action
        if monitors.spikes.is_told(spike):
            events.append(StepEvent("spike", str(spike), {"action": action, **spike.numbers()}))
        if action in ("skip", "rollback") and not late:
            skipped = "spike"
        if action == "rollback" and monitors.may_rewind:
            rewind = Rewind(str(spike), skip_data=True)
    flags = monitors.watch(done) if monitors.sampled else []
    events += [_event(flag) for flag in flags]
    if any(flag.action in ("skip", "rewind") for flag in flags) and not late:
        skipped = skipped or "guard"
    if rewind is None and monitors.may_rewind:
        rewind = _rewind(flags)
    if not skipped and monitors.spikes is not None and math.isfinite(loss):
        monitors.spikes.learn(loss=loss, grad_norm=grad_norm)
    return Verdict(skipped, tuple(events), rewind)


def _rewind(flags: Sequence[Flag]) -> Rewind | None:
    worst = [flag for flag in flags if flag.action == "rewind"]
    pinned = {flag.unit: flag.until for flag in worst if flag.until is not None}
    return Rewind(str(worst[0]), skip_data=False, pinned=pinned) if worst else None


def _event(flag: Flag) -> StepEvent:
    numbers = {name: strict(getattr(flag, name)) for name in ("value", "usual")}
    fields = {"site": flag.site, "reading": flag.reading, "until": flag.until, "action": flag.action}
    return StepEvent("guard", str(flag), {**fields, **numbers})
