"""The ``spikes`` section: what happens when loss or gradient norm jumps.

See :mod:`fp8train.step.spikes` for how a spike is told from noise and :mod:`fp8train.config.schema` for how
sections work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fp8train.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, contradiction


class SpikesConfig(Section):
    """Watches loss and gradient norm of every step."""

    action: Literal["off", "warn", "skip", "rollback"] = "warn"
    """``warn``: tell. ``skip``: also leave the step out, before anything is changed. ``rollback``: also go
    back to the newest good checkpoint, and train on without the data of the last ``data_window`` steps."""
    window: Annotated[int, Field(ge=8, le=65536)] = 128
    """Steps that say what is usual; skipped ones do not count."""
    threshold: PositiveFloat = 6.0
    """Robust standard deviations above the median from which a step is a spike."""
    min_steps: PositiveInt = 32
    """Steps that must be known before one is judged; before, a norm 100 times the largest so far is one."""
    cooldown: NonNegativeInt = 16
    """``warn`` only: steps after a warning without another one."""
    max_rollbacks: PositiveInt = 3
    """Most rollbacks of a run; after them a spike is skipped."""
    data_window: PositiveInt = 16
    """``rollback`` only: steps up to the spike, itself included, whose data is left out; at most those since
    the checkpoint."""
    rerun: bool = False
    """Run forward and backward of a suspicious step (a spike, or not finite) once more before the update, and
    compare: what differs was a fault of a machine, which is named, and the second result is used. Needs
    ``run.deterministic``."""

    @model_validator(mode="after")
    def _learnable(self) -> SpikesConfig:
        if self.min_steps > self.window:
            raise contradiction(
                f"spikes.min_steps ({self.min_steps}) is more than spikes.window ({self.window}) ever holds, "
                f"so no step would be judged; write spikes.min_steps: {self.window}",
                "min_steps",
                "window",
            )
        return self
