"""Conditions on settings, and what to say where one does not hold: the words of the ownership table.

A condition looks at values by dotted key, whatever they come from (a tree that is not validated yet, a
finished configuration). A value that is no legal one is :data:`UNKNOWN`, and then every condition holds: what
is wrong is told as such, and once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fp8train.config.batch_sizes import most_replicas

UNKNOWN: Any = object()
"""Stands for a value that is missing or illegal."""

Look = Callable[[str], Any]
"""The plain value at a dotted key, or :data:`UNKNOWN`."""


class Unmet(NamedTuple):
    """Why a condition does not hold.

    Attributes:
        reason: what is the case instead, ``optimizer.name is lion``.
        remedy: what to write so that it holds, ``optimizer.name=adamw``; empty if nothing would.
        keys: the settings that it looked at.
    """

    reason: str
    remedy: str
    keys: tuple[str, ...]


class Condition(Protocol):
    """Something about other settings that must hold for a setting to be read."""

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Why it does not hold, or None. ``section``: that of the setting; a key that begins with a dot is
        one of the same section."""


def text(value: object) -> str:
    """A value as it is written."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _full(key: str, section: str) -> str:
    return f"{section}{key}" if key.startswith(".") else key


@dataclass(frozen=True)
class Is:
    """A setting has one of these values; the first is the one to recommend."""

    key: str
    values: tuple[Any, ...]

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        key = _full(self.key, section)
        value = look(key)
        if value is UNKNOWN or value in self.values:
            return None
        return Unmet(f"{key} is {text(value)}", f"{key}={text(self.values[0])}", (key,))


@dataclass(frozen=True)
class IsNot:
    """A setting has another value than this one, for example ``instead``."""

    key: str
    value: Any
    instead: Any

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        key = _full(self.key, section)
        if look(key) != self.value:
            return None
        return Unmet(f"{key} is {text(self.value)}", f"{key}={text(self.instead)}", (key,))


@dataclass(frozen=True)
class NotBelow:
    """A number is this large; ``example`` is."""

    key: str
    least: int
    example: int

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        value = look(self.key)
        if not isinstance(value, (int, float)) or value >= self.least:
            return None
        return Unmet(f"{self.key} is {text(value)}", f"{self.key}={self.example}", (self.key,))


@dataclass(frozen=True)
class AllOf:
    """Every one of these holds; the first that does not is told."""

    conditions: tuple[Condition, ...]

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        return next((u for one in self.conditions if (u := one.unmet(look, section)) is not None), None)


@dataclass(frozen=True)
class AnyOf:
    """At least one of these holds."""

    conditions: tuple[Condition, ...]

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        found = [one.unmet(look, section) for one in self.conditions]
        unmet = [one for one in found if one is not None]
        if len(unmet) < len(found):
            return None
        keys = tuple(dict.fromkeys(key for one in unmet for key in one.keys))
        reasons = dict.fromkeys(one.reason for one in unmet)
        remedies = dict.fromkeys(one.remedy for one in unmet if one.remedy)
        return Unmet(" and ".join(reasons), " or ".join(remedies), keys)


@dataclass(frozen=True)
class Unless:
    """A setting has one of these values, which need nothing else, or the condition holds; that is told."""

    key: str
    values: tuple[Any, ...]
    condition: Condition

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        return None if look(self.key) in self.values else self.condition.unmet(look, section)


@dataclass(frozen=True)
class Never:
    """Nothing ever reads it: the section is shared with settings for which it means something."""

    reason: str

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        del look, section
        return Unmet(self.reason, "", ())


@dataclass(frozen=True)
class SeveralReplicas:
    """There may be several ranks whose gradients of one parameter add up: context-parallel ones, or as many
    data-parallel ones as ``parallel.dp`` says, or as the batch can be divided among."""

    def unmet(self, look: Look, section: str) -> Unmet | None:
        """Say what is the case instead, unless it holds."""
        del section
        largest = _most_replicas(look)
        if largest is None or largest > 1:
            return None
        if look("parallel.dp") == 1:
            return Unmet("parallel.dp and parallel.cp are 1", "parallel.dp=auto", ("parallel.dp",))
        batch = "train.global_batch_size"
        return Unmet(
            f"{batch} is one micro-batch, so that one rank has it all",
            f"{batch}={2 * int(look(batch))}",
            (batch, "train.micro_batch_size"),
        )


def _most_replicas(look: Look) -> int | None:
    """See :func:`~fp8train.config.batch_sizes.most_replicas`; None if a value is unknown."""
    dp, cp, micro = look("parallel.dp"), look("parallel.cp"), look("train.micro_batch_size")
    sizes = _batch_sizes(look)
    numbers: Sequence[Any] = (cp, micro, *sizes, *([] if dp == "auto" else [dp]))
    if not all(type(number) is int and number > 0 for number in numbers):
        return None
    return most_replicas(dp, cp, micro, sizes)


def _batch_sizes(look: Look) -> list[Any]:
    """Samples of a step, at the end and in every stage of a ramp."""
    ramp = look("train.batch_size_ramp")
    stages = ramp if isinstance(ramp, list) else []
    ramped = [one.get("global_batch_size", UNKNOWN) if isinstance(one, dict) else UNKNOWN for one in stages]
    return [look("train.global_batch_size"), *ramped]
