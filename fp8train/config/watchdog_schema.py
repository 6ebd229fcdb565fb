"""The ``watchdog`` section: how long a run may stand still.

See :mod:`fp8train.watch` for what it does and :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from pydantic import model_validator

from fp8train.config.section import PositiveFloat, Section, contradiction

_MARGIN_S = 60.0


class WatchdogConfig(Section):
    """Ends a run that hangs, with the name of the rank that the others wait for and exit status 5. What
    counts is time in which *no* rank does anything new: a slow step of one rank is no hang."""

    enabled: bool = True
    """Watch. Without it, a hang ends when collectives give up, a minute after the longest of these times, and
    the error names whoever waited."""
    startup_timeout_s: PositiveFloat = 1800.0
    """Longest standstill until the first step is done: models are built, checkpoints read, kernels
    compiled."""
    step_timeout_s: PositiveFloat = 600.0
    """Longest standstill from then on, in training and between two batches of an evaluation."""
    save_timeout_s: PositiveFloat = 1800.0
    """Longest standstill while a rank saves or ends the run, between two tensors that are written."""
    stopped_timeout_s: PositiveFloat = 60.0
    """Longest standstill if another rank on the same machine sees that a process is stopped (SIGSTOP) or
    gone."""
    interval_s: PositiveFloat = 1.0
    """Seconds between two heartbeats of a rank."""
    stacks: bool = True
    """When a run hangs, write what every rank's threads are at to ``logs/stacks_rank*.txt``, and NCCL's
    flight record beside it."""

    @property
    def collective_timeout_s(self) -> float:
        """When a collective gives up: after the watchdog, which knows more."""
        return max(self.startup_timeout_s, self.step_timeout_s, self.save_timeout_s) + _MARGIN_S

    @model_validator(mode="after")
    def _beats_often_enough(self) -> WatchdogConfig:
        for key in ("stopped_timeout_s", "startup_timeout_s", "step_timeout_s", "save_timeout_s"):
            if self.enabled and getattr(self, key) < 4 * self.interval_s:
                raise contradiction(
                    f"watchdog.{key}: {getattr(self, key):g} is less than four heartbeats, which are "
                    f"{self.interval_s:g} s apart; write a larger one, or a smaller watchdog.interval_s",
                    key,
                    "interval_s",
                )
        return self
