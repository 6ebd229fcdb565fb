"""Whether what happens at certain steps fits into the run: arithmetic on a validated configuration.

A rule for what a person writes, not for the schema: a checkpoint of a run that was started before there was
such a rule can still be read.
"""

from __future__ import annotations

from collections.abc import Iterator

from fp8train.config.all_sections import AllSections
from fp8train.config.layout import LayoutProblem


def length_problems(config: AllSections) -> Iterator[LayoutProblem]:
    """Schedules that the run ends before: a peak, a decay or a batch size that would never be reached."""
    schedule, total = config.schedule, config.total_steps
    length = "train.steps" if config.train.steps is not None else "train.tokens"
    warmup = schedule.warmup_steps or 0
    if warmup > total:
        yield LayoutProblem(
            f"schedule.warmup_steps ({warmup}) is longer than the run ({total} steps), which would end below "
            f"its learning rate; write for example schedule.warmup_steps={max(1, total // 10)}",
            ("schedule.warmup_steps", length),
        )
    elif schedule.kind == "wsd":
        yield from _decay(config, length)
    ramp = sum(stage.steps for stage in config.train.batch_size_ramp)
    if ramp >= total:
        yield LayoutProblem(
            f"train.batch_size_ramp takes {ramp} steps and the run {total}, so that it would never reach "
            f"train.global_batch_size ({config.train.global_batch_size}); shorten the ramp, or lengthen the "
            f"run with {length}",
            ("train.batch_size_ramp", length),
        )


def _decay(config: AllSections, length: str) -> Iterator[LayoutProblem]:
    """``wsd`` decays over its share of the run, unless warm-up takes some of that."""
    schedule, total = config.schedule, config.total_steps
    warmup = schedule.warmup_steps or 0
    if schedule.warmup_fraction is not None:
        warmup = round(schedule.warmup_fraction * total)
        if schedule.warmup_fraction + schedule.decay_fraction <= 1 + 1e-9:
            return  # shares that fit overlap by a rounded step at most
    decay = round(schedule.decay_fraction * total)
    if warmup + decay > total:
        share = int(100 * (total - warmup) / total) / 100
        key = "warmup_steps" if schedule.warmup_fraction is None else "warmup_fraction"
        shorter = f"decay_fraction={share:g}"
        if share == 0:  # warm-up leaves no room
            left = total - decay if key == "warmup_steps" else 1 - schedule.decay_fraction
            shorter = f"{key}={left:g}"
        yield LayoutProblem(
            f"warm-up ({warmup} steps) and decay (schedule.decay_fraction: {schedule.decay_fraction:g}, "
            f"{decay} steps) are longer than the run ({total} steps); shorten one of them, for example "
            f"schedule.{shorter}",
            ("schedule.decay_fraction", f"schedule.{key}", length),
        )


def beyond_the_end(config: AllSections) -> list[str]:
    """What happens every so many steps, more than the run has: one line each. Legal, for defaults are meant
    for long runs, but worth a word."""
    total, lines = config.total_steps, []

    def told(key: str, interval: int, instead: str) -> None:
        if interval > total:
            lines.append(f"{key} ({interval}) is beyond the run's {total} steps: {instead}")

    at_end = "a checkpoint at the end only" if config.checkpoint.save_at_end else "no checkpoint at all"
    told("checkpoint.interval", config.checkpoint.interval, at_end)
    told("train.eval_interval", config.train.eval_interval, "one evaluation, at the end")
    if config.precision.gemm.fp8:
        told(
            "logging.cast_statistics_interval",
            config.logging.cast_statistics_interval,
            f"casts of step 1 only; logging.cast_statistics_interval={sampling_interval(total)} shows more",
        )
    return lines


def sampling_interval(steps: int) -> int:
    """Steps between samples that show the course of a run of ``steps`` steps: ten of them."""
    return max(1, steps // 10)
