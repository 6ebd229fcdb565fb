"""Settings that a person wrote and that nothing will read: they would be ignored silently, so they are
refused.

Refused is only what was written *and* differs from what would stand there anyway: a resolved configuration
that was printed holds every value, and must load again. So a value that equals its default or its preset may
be written even where it is moot: it promises nothing that is not so. Nor does one that asks for what happens
anyway, such as traffic in the compute type.

A later place may turn off what an earlier one describes: ``train.eval_interval=0`` on the command line, or in
a file over its ``base:``, also takes back the ``eval_batches`` below it, as ``eval_batches=null`` would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fp8train.config.conditions import UNKNOWN, Look, Unmet
from fp8train.config.keys import Key, KeyTable
from fp8train.config.nodes import Node, Origin
from fp8train.config.ownership import is_neutral, look_in, why_unread
from fp8train.config.presets import Problem, apply_presets


class _Unread(NamedTuple):
    """A setting that was written and that nothing reads."""

    key: Key
    why: Unmet


def unread_settings(explicit: Node, tree: Node, table: KeyTable) -> list[Problem]:
    """One problem for each such setting.

    Args:
        explicit: what was written, without presets.
        tree: the same over its presets.
        table: the schema's keys.
    """
    unread = _unread(explicit, tree, table)
    if not unread:
        return []
    otherwise, written = look_in(apply_presets(_without(explicit, unread))[0]), look_in(tree)
    problems = []
    for key, why in unread:
        value = written(key.name)
        if key.is_section or (value != otherwise(key.name) and not is_neutral(key.path, value)):
            remedy = f"remove it, or write {why.remedy}" if why.remedy else "remove it"
            if explicit.nearest_origin(key.path).kind == "file":
                remedy = f"{remedy} ({key.name}=null takes back what a file sets)"
            message = f"has no effect: {why.reason}{_by_preset(why, tree)}; {remedy}"
            problems.append(Problem(key.path, message, why.keys))
    return problems


def without_what_later_places_turn_off(
    explicit: Node, table: KeyTable, sources: Sequence[str]
) -> tuple[Node, tuple[str, ...]]:
    """``explicit`` without the settings that are moot because of a place over theirs, and a line on each.

    Args:
        explicit: what was written, without presets.
        table: the schema's keys.
        sources: the files, later ones laid over earlier ones.
    """
    said: list[str] = []
    while True:
        tree = apply_presets(explicit)[0]
        turned_off = [
            one
            for one in _unread(explicit, tree, table)
            if (own := _place(explicit.nearest_origin(one.key.path), explicit, sources)) is not None
            and any(
                (place := _switch_place(k, explicit, tree, sources)) and place > own for k in one.why.keys
            )
        ]
        if not turned_off:
            return explicit, tuple(said)
        said += [
            f"{key.name} of {explicit.nearest_origin(key.path)} is not read: {why.reason}"
            for key, why in turned_off
        ]
        explicit = _without(explicit, turned_off)


def _switch_place(key: str, explicit: Node, tree: Node, sources: Sequence[str]) -> int | None:
    node = tree.find(key.split("."))
    return None if node is None else _place(node.origin, explicit, sources)


def _place(origin: Origin, explicit: Node, sources: Sequence[str]) -> int | None:
    """Which place a value comes from, later ones larger; a preset's is where it was chosen. None: a
    default."""
    if origin.kind == "preset":
        choice = explicit.find(origin.detail.partition("=")[0].split("."))
        return None if choice is None else _place(choice.origin, explicit, sources)
    if origin.kind == "file":
        return sources.index(origin.detail)
    return len(sources) if origin.kind == "command line" else None


def _unread(explicit: Node, tree: Node, table: KeyTable) -> list[_Unread]:
    look = _legal(look_in(tree), table)
    return [
        _Unread(key, why)
        for key in table.keys.values()
        if _is_written(explicit, key) and (why := why_unread(key.path, look)) is not None
    ]


def _by_preset(why: Unmet, tree: Node) -> str:
    """Who chose the value that turns the setting off, where no person did."""
    switch = tree.find(why.keys[0].split(".")) if len(why.keys) == 1 else None
    return f" ({switch.origin})" if switch is not None and not switch.origin.explicit else ""


def _is_written(explicit: Node, key: Key) -> bool:
    if not key.is_section:
        return explicit.explicit(key.path)
    node = explicit.find(key.path)  # an optional section is a value of its own where it is empty
    return key.optional and node is not None and node.value == {} and node.origin.explicit


def _legal(look: Look, table: KeyTable) -> Look:
    """Values that the schema will refuse are unknown."""

    def legal(name: str) -> Any:
        value, fragment = look(name), table.keys[name].fragment
        if "enum" in fragment and value not in fragment["enum"]:
            return UNKNOWN
        wrong = fragment.get("type") == "boolean" and not isinstance(value, bool)
        return UNKNOWN if wrong else value

    return legal


def _without(node: Node, unread: Iterable[_Unread]) -> Node:
    """The tree without these values, which are there."""
    for one in unread:
        node = _without_one(node, one.key.path)
    return node


def _without_one(node: Node, path: tuple[str, ...]) -> Node:
    assert isinstance(node.value, dict)
    name, *rest = path
    children = dict(node.value)
    if rest:
        children[name] = _without_one(children[name], tuple(rest))
    else:
        del children[name]
    return Node(children, node.origin, node.size)
