"""The ``precision.guard`` section: when a linear leaves FP8 for a while.

See :mod:`fp8train.step.guard` for what it does and :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fp8train.config.section import Fraction, PositiveInt, Section
from fp8train.precision.precision import GuardAction


class GuardConfig(Section):
    """Watches the cast statistics of every linear that multiplies in FP8, on sampled steps
    (``logging.cast_statistics_interval``)."""

    action: GuardAction = "off"
    """``report``: name a linear that stands out, in the console and in ``events.jsonl``. ``bf16``: also
    multiply it in the compute type for ``lock`` steps. ``recover``: do more each time that it is flagged
    again: scale by current amaxes instead of delayed ones, leave FP8, skip the step, go back to a
    checkpoint."""
    rise: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4.0
    """Flag a linear whose kurtosis or RMS (of x, grad_output or grad_weight) is this many times its usual."""
    saturated: Fraction = 1e-3
    """Flag a linear of whose x or grad_output more than this share saturated."""
    learn: PositiveInt = 5
    """Sampled steps from which the usual is learnt before it is compared with."""
    lock: PositiveInt = 100
    """Steps in the compute type, or with current scales."""
    budget: PositiveInt = 4
    """Most linears in the compute type or with current scales at a time; the worst come first."""
    total: PositiveInt = 64
    """Most actions of a run; afterwards linears are only reported."""
