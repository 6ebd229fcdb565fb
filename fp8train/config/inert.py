"""Settings that a person wrote and that nothing will read: they would be ignored silently, so they are
refused.

Refused is only what was written *and* differs from what would stand there anyway: a resolved configuration
that was printed holds every value, and must load again. So a value that equals its default or its preset may
be written even where it is moot: it promises nothing that is not so.
"""

from __future__ import annotations

from typing import Any

from fp8train.config.conditions import UNKNOWN, Look, Unmet
from fp8train.config.keys import Key, KeyTable
from fp8train.config.nodes import Node
from fp8train.config.ownership import look_in, why_unread
from fp8train.config.presets import Problem, apply_presets


def unread_settings(explicit: Node, tree: Node, table: KeyTable) -> list[Problem]:
    """One problem for each such setting.

    Args:
        explicit: what was written, without presets.
        tree: the same over its presets.
        table: the schema's keys.
    """
    look = _legal(look_in(tree), table)
    unread = [
        (key, why)
        for key in table.keys.values()
        if _is_written(explicit, key) and (why := why_unread(key.path, look)) is not None
    ]
    if not unread:
        return []
    rest = explicit
    for key, _ in unread:
        rest = _without(rest, key.path)
    otherwise = look_in(apply_presets(rest)[0])
    problems = []
    for key, why in unread:
        if key.is_section or look_in(tree)(key.name) != otherwise(key.name):
            remedy = f"remove it, or write {why.remedy}" if why.remedy else "remove it"
            if explicit.nearest_origin(key.path).kind == "file":
                remedy = f"{remedy} ({key.name}=null takes back what a file sets)"
            message = f"has no effect: {why.reason}{_by_preset(why, tree)}; {remedy}"
            problems.append(Problem(key.path, message, why.keys))
    return problems


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


def _without(node: Node, path: tuple[str, ...]) -> Node:
    """The tree without the value at ``path``, which is there."""
    assert isinstance(node.value, dict)
    name, *rest = path
    children = dict(node.value)
    if rest:
        children[name] = _without(children[name], tuple(rest))
    else:
        del children[name]
    return Node(children, node.origin, node.size)
