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
    multiply it in the compute type for ``lock`` steps."""
    rise: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4.0
    """Flag a linear whose kurtosis or RMS (of x, grad_output or grad_weight) is this many times its usual."""
    saturated: Fraction = 1e-3
    """Flag a linear of whose x or grad_output more than this share saturated."""
    learn: PositiveInt = 5
    """Sampled steps from which the usual is learnt before it is compared with."""
    lock: PositiveInt = 100
    """``bf16`` only: steps in the compute type."""
    budget: PositiveInt = 4
    """``bf16`` only: most linears in the compute type at a time; the worst come first."""
