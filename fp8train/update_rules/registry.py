"""The update rules that there are."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

from fp8train.update_rules.rule import Rule

RuleName = Literal["adamw", "lion"]
"""The registry. The rule NAME is the ``RULE`` of the file NAME.py of this package."""


def rule_names() -> tuple[str, ...]:
    """The names of all rules."""
    return get_args(RuleName)


def rule_named(name: str) -> type[Rule]:
    """The rule of a name in :data:`RuleName`."""
    assert name in rule_names(), f"no update rule is called {name}"
    rule: type[Rule] = import_module(f"{__package__}.{name}").RULE
    assert rule.name == name, f"the rule of {name}.py calls itself {rule.name}"
    return rule


def rules_that_read(setting: str) -> tuple[str, ...]:
    """The names of the rules that have a hyper-parameter of this name."""
    return tuple(name for name in rule_names() if rule_named(name).reads(setting))


def rules_with_second_moment() -> tuple[str, ...]:
    """The names of the rules that keep ``exp_avg_sq`` of hidden matrices."""
    return tuple(name for name in rule_names() if rule_named(name).has_second_moment)
