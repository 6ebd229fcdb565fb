"""The ``profile`` section: a window of steps that is recorded for a trace viewer.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from fp8train.config.section import NonNegativeInt, PositiveInt, Section, contradiction


class ProfileConfig(Section):
    """Which steps are profiled; none by default."""

    start: PositiveInt | None = None
    """First step of the window, counted from 1 as in the log. A run that continues within the window records
    the rest of it, one that continues after it nothing."""
    stop: PositiveInt | None = None
    """Last step of the window. All of it is held in host memory until it is written: a few steps will do."""
    ranks: tuple[NonNegativeInt, ...] = Field(default=(0,), min_length=1, strict=False)
    """Ranks that record; each writes ``profile/rankN_stepsA-B.json.gz`` in the run directory."""
    memory: bool = False
    """Also record every allocation: as counters in the trace, and on CUDA as a snapshot with the stacks of
    the code that asked (``profile/rankN_stepsA-B.pickle``)."""

    @model_validator(mode="after")
    def _window(self) -> ProfileConfig:
        if self.stop is not None and self.start is not None and self.stop < self.start:
            raise contradiction(
                f"profile.stop ({self.stop}) is before profile.start ({self.start}); write profile.stop: "
                f"{self.start} for that step alone",
                "stop",
                "start",
            )
        if self.start is not None and self.stop is None:
            raise contradiction(
                f"profile.start: {self.start} begins a window that profile.stop does not end; write for "
                f"example profile.stop: {self.start + 2}",
                "stop",
                "start",
            )
        if len(set(self.ranks)) < len(self.ranks):
            raise contradiction(f"profile.ranks names a rank twice: {list(self.ranks)}", "ranks")
        return self
