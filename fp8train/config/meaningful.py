"""Where a key says something: what presets leave out, and what nobody may write.

Some keys describe another one: a history belongs to delayed scales, rounding to a format that loses bits. A
preset fills both together; where a person writes the other key differently, the filled one would describe
nothing. So presets leave it at its default there, and only what a person wrote is ever refused. This also
holds between presets: a profile with one scale for each state need not know which states a level keeps in
FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fp8train.config.nodes import Node
from fp8train.config.precision_schema import FP8_STATES, ROUNDED_STATES, SCALED_STATES
from fp8train.update_rules.registry import rules_that_read

Condition = Callable[[Node, tuple[str, ...]], bool]
"""Of the whole tree and the section that a key is in: whether the key says something there."""


def _beside(name: str, *values: str) -> Condition:
    """The key ``name`` of the same section has one of these values, or none yet."""

    def holds(tree: Node, section: tuple[str, ...]) -> bool:
        node = tree.find((*section, name))
        return node is None or node.value in values

    return holds


def can_be_bounded(optimizer: object, *moments: object) -> bool:
    """Whether ``precision.state.bounded_update`` has anything to bound: a rule that reads it, with a moment
    that is stored rounded. Of a rule's name and the moments' formats."""
    return optimizer in rules_that_read("bounded_update") and any(
        moment in ROUNDED_STATES for moment in moments
    )


def _can_be_bounded(tree: Node, section: tuple[str, ...]) -> bool:
    optimizer = tree.find(("optimizer", "name"))
    moments = [tree.find((*section, role, "format")) for role in ("exp_avg", "exp_avg_sq")]
    return can_be_bounded(
        "adamw" if optimizer is None else optimizer.value,
        *(None if moment is None else moment.value for moment in moments),
    )


class _Rule(NamedTuple):
    """Keys called ``name`` below ``prefix`` say something where ``condition`` holds."""

    prefix: tuple[str, ...]
    name: str
    condition: Condition


_GEMM, _STATE = ("precision", "gemm"), ("precision", "state")
_RULES = (
    _Rule(_GEMM, "history", _beside("scale_source", "delayed")),
    _Rule(_GEMM, "reduce", _beside("scale_source", "delayed")),
    _Rule(_GEMM, "constant_exponent", _beside("scale_source", "constant")),
    _Rule(_GEMM, "power_of_two", _beside("scale_source", "current", "delayed")),
    _Rule(_STATE, "rounding", _beside("format", *ROUNDED_STATES)),
    _Rule(_STATE, "granularity", _beside("format", *SCALED_STATES)),
    _Rule(_STATE, "expand", _beside("format", *FP8_STATES)),
    _Rule(_STATE, "expand", _beside("granularity", "block")),
    _Rule(_STATE, "bounded_update", _can_be_bounded),
    _Rule(("precision", "gradient", "fp8"), "mu_initial", _beside("reduce", "shared_scale")),
)


def says_something(tree: Node, *path: str) -> bool:
    """Whether the key at ``path`` says anything beside the others."""
    *section, name = path
    return all(
        rule.condition(tree, tuple(section))
        for rule in _RULES
        if rule.name == name and tuple(section[: len(rule.prefix)]) == rule.prefix
    )


def without_the_meaningless(tree: Node) -> Node:
    """``tree`` without the values that presets filled and that say nothing beside the others."""
    return _pruned(tree, tree, ())


def _pruned(node: Node, tree: Node, path: tuple[str, ...]) -> Node:
    if not isinstance(node.value, dict):
        return node
    children = {
        name: _pruned(child, tree, (*path, name))
        for name, child in node.value.items()
        if child.origin.kind != "preset" or says_something(tree, *path, name)
    }
    return Node(children, node.origin, 1 + sum(child.size for child in children.values()))
