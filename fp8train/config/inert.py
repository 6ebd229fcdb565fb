"""Settings that a person wrote and that another setting makes meaningless: they would be ignored silently.

Refused is only what was written *and* differs from what would stand there anyway: a resolved configuration
that was printed holds every value, and must load again.
"""

from __future__ import annotations

from typing import NamedTuple

from fp8train.config.keys import KeyTable
from fp8train.config.nodes import Node
from fp8train.config.presets import Problem, apply_presets
from fp8train.update_rules.registry import rules_that_read, rules_with_second_moment


class _Rule(NamedTuple):
    """``key``, or what is below it, is read only where ``switch`` has one of the values ``needs``."""

    key: str
    switch: str
    needs: tuple[str, ...]


_RULES = (
    _Rule("optimizer.eps", "optimizer.name", rules_that_read("eps")),
    _Rule("precision.state.exp_avg_sq", "optimizer.name", rules_with_second_moment()),
    _Rule("schedule.decay_fraction", "schedule.kind", ("wsd",)),
    _Rule("model.rope_theta", "model.positions", ("rope",)),
)


def unread_settings(explicit: Node, tree: Node, table: KeyTable) -> list[Problem]:
    """One problem for each such setting.

    Args:
        explicit: what was written, without presets.
        tree: the same over its presets.
        table: the schema's keys.
    """
    problems = []
    for rule in _RULES:
        switch = tree.find(rule.switch.split("."))
        value = table.keys[rule.switch].fragment.get("default") if switch is None else switch.value
        legal = table.keys[rule.switch].fragment["enum"]
        if value in rule.needs or value not in legal:  # what is no choice at all is reported as such
            continue
        for key in table.leaves():
            path = key.path
            if f"{key.name}.".startswith(f"{rule.key}.") and explicit.explicit(path):
                filled = apply_presets(_without(explicit, path))[0].find(path)
                otherwise = key.fragment.get("default") if filled is None else filled.value
                written = tree.find(path)
                if written is not None and written.value != otherwise:
                    message = (
                        f"has no effect: {rule.switch} is {value}; remove it, or write "
                        f"{rule.switch}={rule.needs[0]} ({key.name}=null takes back what a file sets)"
                    )
                    problems.append(Problem(path, message, (rule.switch,)))
    return problems


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
