"""The ``checkpoint`` section: saving, resuming, and what a new run starts from.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fp8train.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, contradiction


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: NonNegativeInt = 1000
    """Save every this many steps; 0 = only at the end and on request."""
    save_at_end: bool = True
    """Save after the last step."""
    keep_last: PositiveInt = 2
    """Complete checkpoints to retain; older ones are deleted after a newer one is safe."""
    keep_every: NonNegativeInt = 0
    """Also retain, for ever, checkpoints of steps that are multiples of this; 0 = none."""
    keep_best: NonNegativeInt = 0
    """Also retain this many checkpoints with the lowest ``eval/loss``, of those saved at a step that is
    evaluated; needs ``train.eval_interval``."""
    asynchronous: bool = False
    """Write checkpoints while training goes on: it stands still only for a copy to host memory, which takes
    as many bytes as this rank writes (its share of the checkpoint) for the rest of the run."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be saved: ``stop`` ends the run with the error, exit status 2, the last good
    checkpoint kept; ``continue`` warns, records the event ``checkpoint_failed`` and tries again at the next
    interval. A save on request or at the end that fails is an error either way."""
    verify: Literal["full", "size"] = "full"
    """What is checked of a checkpoint before it is loaded: ``full``: SHA-256 of every file; ``size``: sizes,
    and SHA-256 of files up to 1 MiB only, for checkpoints that take too long to read twice."""
    visibility_timeout_s: PositiveFloat = 60.0
    """How long each rank waits, at a save and at the start, until it sees what another one wrote; for network
    file systems, where a new file may show up seconds later on another machine."""
    resume: str = "never"
    """``never``: refuse a run directory that already holds a run; ``auto``: continue from its newest complete
    checkpoint, or start fresh; a path: continue from exactly that checkpoint, or fail. A path is carried out
    once: the same command, started again, goes on from the newest checkpoint since."""
    accept_changes: tuple[str, ...] = Field(default=(), strict=False)
    """Settings, or sections of them, that a resumed run may have changed although they change what is
    trained: ``[precision, optimizer.lr]``. The layout may always change."""
    reshard: Literal["refuse", "requantise"] = "refuse"
    """What happens where tensor parallelism cuts blocks of optimizer states that share a scale: an error, or
    smaller blocks, for which stored states are rounded once more (and reported)."""
    init_from: str | None = None
    """A checkpoint, or a run or checkpoints directory for its newest, whose weights a new run starts from;
    any layout and formats. A run that ``resume`` continues does not look at it."""
    init_mode: Literal["model", "warm"] = "model"
    """What ``init_from`` takes: ``model``: the weights; ``warm``: the optimizer's moments and its count of
    updates too. Schedule and data start at step 0."""

    @model_validator(mode="after")
    def _one_beginning(self) -> CheckpointConfig:
        if self.init_from is not None and self.resume not in ("never", "auto"):
            raise contradiction(
                f"init_from starts a new run, but resume: {self.resume} continues one; remove one of them, "
                "or write resume: auto, which looks at init_from only where there is nothing to continue",
                "init_from",
                "resume",
            )
        if self.init_from in ("never", "auto"):
            raise contradiction(
                f"init_from: {self.init_from} is no checkpoint; name a step, run or checkpoints directory, "
                "or leave it out",
                "init_from",
            )
        return self
