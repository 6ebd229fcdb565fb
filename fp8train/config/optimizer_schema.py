"""The ``optimizer`` and ``schedule`` sections.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fp8train.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    contradiction,
)
from fp8train.update_rules.registry import RuleName, rule_named, rule_names

DecayRule = Literal["lr_times_lambda", "independent", "fully_decoupled"]
MAX_DECAY_PER_STEP = 0.01
"""Share of every weight that a step may remove; more is a λ meant for another decay rule."""


class OptimizerConfig(Section):
    """The update rule and its hyper-parameters; weight decay is decoupled."""

    name: RuleName = Field(
        "adamw",
        description="Update rule. "
        + " ".join(f"``{name}``: {rule_named(name).summary}" for name in rule_names()),
    )
    lr: PositiveFloat = Field(examples=[3.0e-4])
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment (AdamW); under ``mus`` to that of gradients times their scale
    S (``parametrization.gradient_scale_exponent``), so that it means the same at every width and batch."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay λ of matrices; 1-D parameters (norms, biases) are not decayed, but for those of ``mus``. 0.1, or
    1e-4 with ``parametrization.kind: mus`` or ``umup``, whose ``decay_rule`` does not multiply it by the
    learning rate."""
    decay_rule: DecayRule = "lr_times_lambda"
    """``lr_times_lambda``: ``w -= lr·λ·w`` (torch's AdamW); ``independent``: ``λ`` times the schedule,
    without the peak rate (``umup``); ``fully_decoupled``: ``w -= λ·w`` at every step (``mus``)."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 = never (the default of ``umup``). The norm, also the logged
    one, is that of the gradients of effective weights, multipliers included, so that 1.0 means the same in
    every parametrisation: ``docs/recipes.md``."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and moments rest between steps. ``none``: on the device; ``cpu``: in page-locked
    host memory, from where they come for each step, a few at a time, and go back while the next ones come:
    the same bits, for their bytes over the bus in both directions (with ``engine: deepspeed``: updated on the
    host); ``nvme``, with ``engine: deepspeed``: a disk."""


class ScheduleConfig(Section):
    """Learning rate over steps."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after warm-up; ``wsd``: constant, then a linear decay over the last ``decay_fraction`` of the
    run."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up from 0. At most one of ``warmup_steps`` and ``warmup_fraction``."""
    warmup_fraction: Fraction | None = None
    """Warm-up as a share of all steps."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate divided by the peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps that ``wsd`` decays over."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleConfig:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise contradiction(
                "set at most one of schedule.warmup_steps and schedule.warmup_fraction; to use the steps "
                "write schedule.warmup_fraction=null, to use the share schedule.warmup_steps=null",
                "warmup_steps",
                "warmup_fraction",
            )
        return self
