"""What is wrong with a value, and the checks that values share.

A value collects everything that is wrong with it and raises it as one error. Each problem names its fields
by dotted keys relative to the value, worst first, so that whoever built it from a file can point at lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Problem(NamedTuple):
    """One broken rule: what is wrong and what to write, and the keys that do not fit together."""

    message: str
    keys: tuple[str, ...]


class PrecisionError(ValueError):
    """Values that mean nothing, alone or together; ``problems`` are all that were found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{', '.join(keys)}: {message}" for message, keys in self.problems))


def refuse(problems: Iterable[Problem]) -> None:
    """Raise a :class:`PrecisionError` if there are any."""
    if found := tuple(problems):
        raise PrecisionError(found)


@cache
def _choices(kind: type) -> dict[str, tuple[object, ...]]:
    """The legal values of the fields whose type is a ``Literal``."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def illegal_choices(value: Any) -> Iterator[Problem]:
    """One problem for each ``Literal`` field of a dataclass that has another value."""
    for name, legal in _choices(value.__class__).items():
        if (given := getattr(value, name)) not in legal:
            yield Problem(f"{name}: {given!r}; legal: {', '.join(map(str, legal))}", (name,))


def out_of_range(value: object, name: str, low: float, high: float | None, unit: str) -> Iterator[Problem]:
    """A problem if the number in field ``name`` is not within [low, high]."""
    given = getattr(value, name)
    if given < low or (high is not None and given > high):
        legal = f"{low} or more" if high is None else f"{low} to {high}"
        yield Problem(f"{name}: {given} {unit}; legal: {legal}", (name,))


class Reads(NamedTuple):
    """Fields of a value that are read only where its field ``switch`` has one of ``values``."""

    names: tuple[str, ...]
    switch: str
    values: tuple[str, ...]


def unread(value: Any, reads: Iterable[Reads]) -> Iterator[Problem]:
    """One problem for each field that is not at its default although nothing reads it."""
    told = set()
    for names, switch, values in reads:
        chosen = getattr(value, switch)
        chosen = getattr(chosen, "name", chosen)
        for name in names if chosen not in values else ():
            given = getattr(value, name)
            if given != value.__dataclass_fields__[name].default and name not in told:
                told.add(name)
                written = str(given).lower() if isinstance(given, bool) else given
                yield Problem(
                    f"{name}: {written} is read with {switch}: {' or '.join(values)}, but {switch} is "
                    f"{chosen}; remove it",
                    (name, switch),
                )
