"""From pydantic's findings to messages that a person can act on.

A message is ``file:line: section.key: what is wrong; what to write``, one line per problem and at most five
lines in all; a fifth line names the keys of further problems. What was written and is wrong comes first, in
file order, then what is missing. A key that is missing because it was misspelt is not reported twice.
Pydantic's own wording is not used: the expected type comes from the schema
(:func:`fp8train.config.keys.describe`), the position from the :class:`~fp8train.config.nodes.Node` tree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from fp8train.config.errors import ConfigError
from fp8train.config.hints import meant_key, show, suggest_key, suggest_value
from fp8train.config.keys import Key, KeyTable, describe
from fp8train.config.nodes import Node, Origin, Path, dotted
from fp8train.config.presets import Problem
from fp8train.config.scalars import shorten

MAX_LINES = 5
"""Lines of an error message."""
_MAX_NAMED = 12
"""Keys that its last line names."""


def problems_of(
    error: ValidationError, tree: Node, table: KeyTable, misspelt: Collection[str] = ()
) -> list[Problem]:
    """Translate what pydantic found in ``tree``; one problem per key.

    Keys that presets would have filled are not reported as missing: whatever kept the preset from applying
    is. Nor are keys that an unknown one stands for, here or among ``misspelt`` (keys meant elsewhere).
    """
    found: dict[Path, Problem] = {}
    meant = set(misspelt)
    for item in error.errors(include_url=False):
        path, fragment = table.locate(item["loc"])
        if path in found:
            continue
        if item["type"] == "extra_forbidden" or fragment is None:
            message = f"unknown key; {suggest_key(table, path)}"
            meant.add(meant_key(table, path) or "")
        elif item["type"] == "missing":
            key = table.keys.get(dotted(path))
            if key is None and isinstance(path[-1], int):  # a list that is too short
                path, fragment = table.locate(path[:-1])
                assert fragment is not None
                found[path] = Problem(path, _wrong_value(path, fragment, item, tree, table))
                continue
            if key is not None and not key.required:
                continue
            found[path] = Problem(path, _missing(key, table), missing=True)
            continue
        elif item["type"] == "contradiction":
            for context in item["ctx"]["all"]:
                problem = _contradiction(path, context, tree)
                found[(*path, *problem.path, *problem.related, problem.message)] = problem
            continue
        else:
            message = _wrong_value(path, fragment, item, tree, table)
        found[path] = Problem(path, message)
    return [
        problem
        for problem in found.values()
        if not (problem.missing and _starts(meant, dotted(problem.path)))
    ]


def _starts(meant: Collection[str], missing: str) -> bool:
    """Whether one of the keys that were meant is the missing one, or inside the missing section."""
    return any(name == missing or name.startswith(f"{missing}.") for name in meant)


def _contradiction(path: Path, context: dict[str, Any], tree: Node) -> Problem:
    first, *others = ((*path, *key.split(".")) for key in context["keys"])
    missing = all(tree.find(key) is None for key in (first, *others))  # one of them is needed
    return Problem(first, context["message"], tuple(dotted(other) for other in others), missing)


def _missing(key: Key | None, table: KeyTable) -> str:
    if key is None:  # inside a list of the blend
        return "is required; an entry is {prefix: data/my_corpus, weight: 1.0}"
    if not key.is_section:
        return f"is required; for example  {key.path[-1]}: {show_example(key.example)}"
    needed = [child for child in table.children(key.path) if child.required or child.example is not None]
    example = ", ".join(f"{child.path[-1]}: {show_example(child.example)}" for child in needed)
    return f"the section is required; for example  {key.path[-1]}: {{{example}}}"


def show_example(value: object) -> str:
    """An example as written in YAML, without quotes."""
    return f"{value:.1e}" if isinstance(value, float) and value < 0.01 else str(value)


def _wrong_value(path: Path, fragment: dict[str, Any], item: Any, tree: Node, table: KeyTable) -> str:
    node = tree.find(path)
    value = item["input"] if node is None else node.plain()
    key = table.keys.get(dotted(path))
    if fragment.get("properties") is not None:
        if value is None:
            return "the section is empty; remove the line, or put keys under it"
        return f"expected {describe(fragment)}; got {show(value)}"
    expected = describe(fragment, optional=key is not None and key.optional, instead_of=value)
    return f"expected {expected}; got {show(value)}{suggest_value(fragment, value)}"


class _Told(NamedTuple):
    """A problem in words; they sort by ``order``: missing or not, file in order of inclusion, line, key."""

    order: tuple[bool, int, int, str]
    key: str
    where: str
    text: str


def raise_problems(
    problems: Iterable[Problem], tree: Node, sources: Sequence[str], refused: Sequence[tuple[str, str]] = ()
) -> None:
    """Raise one :class:`ConfigError` that lists ``problems``, what is missing last and otherwise in file
    order; returns if there are none.

    ``refused`` are (key, message) of what could not be laid over the files at all; it stands before what is
    missing.
    """
    told = [_line(problem, tree, sources) for problem in problems]
    told += [
        _Told((False, len(sources), number - len(refused), ""), key, "", message)
        for number, (key, message) in enumerate(refused)
    ]
    told.sort()
    lines = [one.text for one in told]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], _rest(told[MAX_LINES - 1 :])]
    if lines:
        raise ConfigError("\n".join(lines))


def _rest(told: Sequence[_Told]) -> str:
    """One line for the problems that have none of their own; files by their last name, to keep it short."""
    named = [
        shorten(one.key, 60) + (f" ({one.where.rpartition('/')[2]})" if one.where else "")
        for one in told[:_MAX_NAMED]
    ]
    more = f", and {len(told) - _MAX_NAMED} more" if len(told) > _MAX_NAMED else ""
    return f"... and {len(told)} more problems: {', '.join(named)}{more}"


def _line(problem: Problem, tree: Node, sources: Sequence[str]) -> _Told:
    """One problem in words."""
    paths = [problem.path, *(tuple(key.split(".")) for key in problem.related)]
    explicit = [path for path in paths if tree.explicit(path)]
    anchor = explicit[0] if explicit else problem.path
    origin = problem.origin or tree.nearest_origin(anchor)
    where = position(origin, tree)
    keys = ", ".join(shorten(_printable(dotted(path)), 120) for path in paths)
    others = [path for path in explicit if path != anchor and str(tree.nearest_origin(path)) != str(origin)]
    also = "".join(f" ({dotted(path)}: {tree.nearest_origin(path)})" for path in others)
    file = sources.index(origin.detail) if origin.detail in sources else len(sources)
    return _Told(
        (problem.missing, file, origin.line or 0, keys),
        _printable(dotted(problem.path)),
        "missing" if problem.missing else where,
        f"{where}: {keys}: {problem.message}{also}",
    )


def position(origin: Origin, tree: Node) -> str:
    """Where to look: ``file:line`` or ``command line``; values nobody wrote point at the file as a whole."""
    return str(origin if origin.explicit else tree.origin)


def _printable(text: str) -> str:
    """``text`` on one line of plain characters."""
    return text if text.isprintable() and text.isascii() else ascii(text)[1:-1]
