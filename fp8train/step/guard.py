"""Finds linears whose numbers leave their usual range, and takes them out of FP8 for a while.

Long runs in FP8 end where one tensor outgrows what eight bits hold: an outlier channel before a down
projection, a biased attention output. The cast statistics show it in the linear where it happens, so the cure
can be local: with ``action: bf16`` that linear multiplies in the compute type for ``lock`` steps, and at most
``budget`` linears at a time do, so that a false alarm costs little and a run whose trouble is elsewhere does
not turn into BF16 behind its owner's back. The idea of bounded recovery of flagged units is GNMR's (arXiv
2606.00539); thresholds here are our own.

With ``action: recover`` what is done to a linear grows while it stays in trouble, each time it is flagged:

1. *current*: its delayed scales of x and grad_output are forgotten before each of the next ``lock`` steps, so
   that every tensor is scaled by its own amax (left out by recipes that do that anyway);
2. *bf16*: it multiplies in the compute type for ``lock`` steps;
3. *skip*: this step is left out, before anything is changed, and then as 2;
4. *rewind*: the run goes back to its newest good checkpoint, with this linear in the compute type until
   ``lock`` steps after the one that showed it.

Who is quiet for ``lock`` steps after that is over begins at 1 again. Linears beyond ``budget`` at a time, and
all after ``total`` actions, are only reported.

A *reading* is a number of one cast: kurtosis or RMS of x or grad_output, RMS of grad_weight. Its usual is an
average over about the last ten sampled steps. A reading counts in it by at most ``rise`` times the usual: one
spike does not hide the next, and a lasting change becomes usual within some samples. A linear is flagged when
a reading exceeds ``rise`` times its usual, when more than ``saturated`` of a cast saturated, or when a source
was not finite.

Decisions are a function of the readings alone, which are the largest over all ranks: so all ranks decide
alike, and a resumed run as the unbroken one. Statistics exist on sampled steps only, so trouble is seen up to
``logging.cast_statistics_interval`` steps after it starts; a linear out of FP8 has no readings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.config.guard_schema import GuardConfig
from fp8train.numerics.statistics import FIELDS

READINGS = ("kurtosis", "rms", "saturated")
Action = Literal["report", "current", "bf16", "skip", "rewind"]
LADDER: tuple[Action, ...] = ("current", "bf16", "skip", "rewind")
_MEMORY = 10

Table = Mapping[str, Mapping[str, float]]
"""``{cast site: {reading: value}}``; a value is infinite where the source was not finite."""


@dataclass(frozen=True)
class Flag:
    """A linear whose reading stands out, and what was done about it.

    Attributes:
        unit: path of the linear.
        site: the cast that shows it, ``PATH/operand``.
        reading: which of :data:`READINGS`.
        value: what it was.
        usual: what it usually is; for ``saturated`` the permitted share.
        until: last step in the compute type, or with current scales; None if nothing changes.
        action: what was done.
    """

    unit: str
    site: str
    reading: str
    value: float
    usual: float
    until: int | None
    action: Action = "report"

    @property
    def ratio(self) -> float:
        """How far the reading is from usual, as a multiple of it."""
        return math.inf if self.usual == 0 else self.value / self.usual

    def __str__(self) -> str:
        what = "not finite" if math.isinf(self.value) else f"{self.value:.3g}, usually {self.usual:.3g}"
        done = "" if self.until is None else f": {_DONE[self.action]} until step {self.until}"
        return f"guard: {self.site} {self.reading} {what}{done}"


_DONE = {
    "current": "scales each tensor by its own amax",
    "bf16": "leaves FP8",
    "skip": "the step is skipped, and it leaves FP8",
    "rewind": "back to a checkpoint, and out of FP8",
}


@dataclass
class _Usual:
    """Running mean of a reading: over all samples at first, then over about the last ten."""

    mean: float = 0.0
    count: int = 0

    def add(self, value: float, rise: float) -> None:
        self.count += 1
        if self.mean > 0:
            value = min(value, rise * self.mean)
        self.mean += (value - self.mean) / min(self.count, _MEMORY)


@dataclass
class Guard:
    """The state of the guard, equal on all ranks.

    Attributes:
        config: thresholds.
        units: paths of the linears that multiply in FP8, of the whole model.
        delayed: whether they have delayed scales of x or grad_output.
        locked: linears out of FP8 and the last step of it.
        current: linears whose delayed scales are not used, and the last step of that.
        actions: how often something was done to a linear.
        levels: of linears in trouble, the last of :data:`LADDER` that was done, and the step until which the
            next one follows.
    """

    config: GuardConfig
    units: Sequence[str]
    delayed: bool = False
    locked: dict[str, int] = field(default_factory=dict)
    current: dict[str, int] = field(default_factory=dict)
    actions: int = 0
    levels: dict[str, tuple[int, int]] = field(default_factory=dict)
    _usual: dict[tuple[str, str], _Usual] = field(default_factory=dict)

    def release(self, step: int) -> list[str]:
        """Let linears whose time is over back into FP8 with step ``step`` (1-based), and return their
        paths. Those on current scales return to delayed ones."""
        back = [unit for unit, until in self.locked.items() if until < step]
        for unit in back:
            del self.locked[unit]
        self.current = {unit: until for unit, until in self.current.items() if until >= step}
        return back

    def observe(self, step: int, table: Table) -> list[Flag]:
        """Judge the readings of step ``step``, then learn from them.

        Returns:
            Flagged linears, the worst first, each with its worst reading.
        """
        worst: dict[str, Flag] = {}
        for site, readings in table.items():
            unit, _, operand = site.rpartition("/")
            if unit in self.locked or unit not in self.units or operand == "w":
                continue
            for flag in self._judge(unit, operand, readings):
                if unit not in worst or flag.ratio > worst[unit].ratio:
                    worst[unit] = flag
        flags = sorted(worst.values(), key=lambda flag: (-flag.ratio, flag.unit))
        return [self._act(flag, step) for flag in flags]

    def _judge(self, unit: str, operand: str, readings: Mapping[str, float]) -> list[Flag]:
        site, config, found = f"{unit}/{operand}", self.config, []
        for reading in ("rms",) if operand == "grad_weight" else ("kurtosis", "rms"):
            value, usual = readings[reading], self._usual.setdefault((site, reading), _Usual())
            known = usual.count >= config.learn and usual.mean > 0
            if not math.isfinite(value) or (known and value > config.rise * usual.mean):
                found.append(Flag(unit, site, reading, value, usual.mean, None))
            if math.isfinite(value) and value > 0:  # zeros (a step without targets) say nothing about size
                usual.add(value, config.rise)
        if operand != "grad_weight" and readings["saturated"] > config.saturated:
            share = readings["saturated"]
            found.append(Flag(unit, site, "saturated", share, config.saturated, None))
        return found

    def _act(self, flag: Flag, step: int) -> Flag:
        config, unit = self.config, flag.unit
        room = unit in self.current or len(self.locked) + len(self.current) < config.budget
        if config.action == "report" or not room or self.actions >= config.total:
            return flag
        action: Action = "bf16"
        until = step + config.lock
        if config.action == "recover":
            level, watched = self.levels.get(unit, (-1, 0))
            level = min(level + 1 if step <= watched else 0, len(LADDER) - 1)
            if level == 0 and not self.delayed:
                level = 1
            self.levels[unit] = (level, until + config.lock)
            action = LADDER[level]
        self.actions += 1
        self.current.pop(unit, None)
        (self.current if action == "current" else self.locked)[unit] = until
        return replace(flag, until=until, action=action)

    def rewound(self, pinned: Mapping[str, int], actions: int) -> None:
        """Go on from the state of a checkpoint that a rewind returned to: with these linears out of FP8 until
        these steps, which are ahead, and with the count of actions that led there."""
        self.locked |= pinned
        self.actions = max(self.actions, actions)

    def state(self) -> dict[str, Any]:
        """The guard's state for a checkpoint, as JSON values."""
        usual = [[*key, one.mean, one.count] for key, one in self._usual.items()]
        return {
            "locked": dict(self.locked),
            "usual": usual,
            "current": dict(self.current),
            "actions": self.actions,
            "levels": {unit: list(level) for unit, level in self.levels.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`; linears that are not watched any more are forgotten, and all return to
        FP8 where the action no longer takes them out. Earlier versions only knew of those."""
        kept = self.units if self.config.action in ("bf16", "recover") else ()
        self.locked = {unit: until for unit, until in state["locked"].items() if unit in kept}
        self.current = {unit: until for unit, until in state.get("current", {}).items() if unit in kept}
        self.levels = {unit: tuple(at) for unit, at in state.get("levels", {}).items() if unit in kept}
        self.actions = state.get("actions", 0)
        self._usual = {
            (site, reading): _Usual(mean, count)
            for site, reading, mean, count in state["usual"]
            if site.rpartition("/")[0] in self.units
        }


def agreed_readings(sites: Sequence[str], rows: Tensor, group: CountedGroup) -> Table:
    """The largest reading of each cast over ranks; collective, waits for the device.

    Args:
        sites: cast sites.
        rows: FP32 [sites, FIELDS], see :mod:`fp8train.numerics.statistics`.
        group: all ranks; every one has a row for each site.
    """
    columns = torch.stack([rows[:, FIELDS.index(name)] for name in READINGS], dim=1)
    never = torch.isnan(rows[:, FIELDS.index("zero")])  # not recorded
    finite = torch.isfinite(rows[:, FIELDS.index("amax")])
    columns = torch.where(finite[:, None], columns, torch.inf)
    columns = torch.where(never[:, None], -1.0, columns)
    group.all_reduce(columns, purpose="statistics", op=dist.ReduceOp.MAX)()
    return {
        site: dict(zip(READINGS, values, strict=True))
        for site, values in zip(sites, columns.tolist(), strict=True)
        if values[0] >= 0
    }
