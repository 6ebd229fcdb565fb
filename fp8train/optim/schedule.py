"""Learning rate as a pure function of the step, so there is nothing to checkpoint but the step."""

from __future__ import annotations

import math

from fp8train.config.optimizer_schema import ScheduleConfig


def warmup_steps(schedule: ScheduleConfig, total_steps: int) -> int:
    """Steps of linear warm-up, from either way of saying it."""
    if schedule.warmup_fraction is not None:
        return round(schedule.warmup_fraction * total_steps)
    return schedule.warmup_steps or 0


def lr_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step divided by the peak.

    Warm-up takes W steps: step s < W gets (s + 1) / W. The last step of the run gets ``min_lr_ratio`` (but
    for ``constant``).

    Args:
        schedule: shape.
        step: 0-based optimizer step.
        total_steps: length of the run.
    """
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    start = warmup
    if schedule.kind == "wsd":
        start = max(warmup, total_steps - max(1, round(schedule.decay_fraction * total_steps)))
        if step < start:
            return 1.0
    progress = min(1.0, (step - start + 1) / max(1, total_steps - start))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape
