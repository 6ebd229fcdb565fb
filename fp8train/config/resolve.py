"""One validated :class:`~fp8train.config.schema.Config` from files, presets and the command line.

Order, the later winning: schema defaults, presets (family, level, recipe), ``base:`` files, the file itself,
overrides. Only a value's *place* decides, never its content, and the place is kept for every key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from fp8train.config.errors import ConfigError
from fp8train.config.inert import unread_settings
from fp8train.config.keys import KeyTable, key_table
from fp8train.config.length import length_problems
from fp8train.config.loader import load_file
from fp8train.config.meaningful import says_something
from fp8train.config.messages import problems_of, raise_problems
from fp8train.config.misspelt import rename_misspelt_sections
from fp8train.config.nodes import DEFAULT, Node, Origin, merge
from fp8train.config.overrides import OverrideError, parse_override
from fp8train.config.presets import Problem, apply_presets
from fp8train.config.recipe_registry import STATIC_RECIPES
from fp8train.config.scalars import ScalarError, check_text
from fp8train.config.schema import Config
from fp8train.config.yaml_tree import MAX_DEPTH
from fp8train.update_rules.registry import rules_that_read


@dataclass(frozen=True)
class ResolvedConfig:
    """A config and where each of its values came from.

    ``origins`` has one entry per leaf, by dotted key. ``sources`` lists the files read, later ones laid over
    earlier ones.
    """

    config: Config
    origins: Mapping[str, Origin]
    sources: tuple[str, ...]


def load_config(path: str | FilePath, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """Read, combine and validate.

    Args:
        path: YAML file.
        overrides: ``section.key=value`` texts, laid over the file in order.

    Raises:
        ConfigError: anything wrong with the file, the files it includes, or an override.
    """
    root, sources = load_file(path)
    return _resolve(root, sources, overrides)


def resolve_mapping(
    data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "config"
) -> ResolvedConfig:
    """Validate a mapping that is already in memory as :func:`load_config` validates files; ``source`` names
    it in messages.

    Raises:
        ConfigError: also for keys that are not text and values that YAML could not hold.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected a mapping of sections, got {type(data).__name__}")
    return _resolve(_to_node(data, Origin("file", source), 0), (source,), overrides)


def _resolve(root: Node, sources: tuple[str, ...], overrides: Sequence[str]) -> ResolvedConfig:
    table = key_table()
    refused: list[OverrideError] = []
    for text in overrides:
        try:
            root = merge(root, parse_override(text, table))
        except OverrideError as error:
            refused.append(error)
    root, misspelt = rename_misspelt_sections(root, table)
    tree, problems = apply_presets(root)
    problems += _fp8_off_but_set(tree) or (
        _fp8_gradients_off_but_set(tree) + _grad_weight_operands_off_but_set(tree)
    )
    problems += _bound_set_but_unread(tree) + unread_settings(root, tree, table)
    config = _validate(tree, table, problems, [error.meant or "" for error in refused])
    raise_problems([*misspelt, *problems], tree, sources, [(error.key, str(error)) for error in refused])
    assert config is not None
    return ResolvedConfig(config, _origins(config, tree, table), sources)


def _validate(tree: Node, table: KeyTable, problems: list[Problem], misspelt: Sequence[str]) -> Config | None:
    """The config, or None with what is wrong added to ``problems``; nothing where keys are missing that
    ``misspelt`` ones explain."""
    try:
        config = Config.model_validate(tree.plain())
    except ValidationError as error:
        problems += problems_of(error, tree, table, misspelt)
        if (
            not problems and not misspelt
        ):  # a preset that fills too little: ours to mend, with pydantic's own report
            raise
        return None
    for found in length_problems(config):
        key, *related = found.keys
        problems.append(Problem(tuple(key.split(".")), found.message, tuple(related)))
    return config


def _fp8_off_but_set(tree: Node) -> list[Problem]:
    """Settings of FP8 GEMMs that a person wrote while FP8 GEMMs are off: they would be ignored silently."""
    off = tree.find(("precision", "gemm", "fp8"))
    if off is None or off.value is not False:
        return []
    gemm = tree.find(("precision", "gemm"))
    assert gemm is not None
    assert isinstance(gemm.value, dict)
    inert: list[tuple[str, ...]] = [("precision", "gemm", key) for key in gemm.value if key != "fp8"]
    recipe = tree.find(("precision", "recipe"))
    if recipe is not None and recipe.value not in STATIC_RECIPES:  # those shape the model in BF16 too
        inert.insert(0, ("precision", "recipe"))
    profile = tree.find(("precision", "profile"))
    if profile is not None and profile.value != "default":
        inert.append(("precision", "profile"))
    plan = tree.find(("precision", "state", "plan"))
    if plan is not None and plan.value != "default":
        inert.append(("precision", "state", "plan"))
    reason = "" if off.origin.explicit else f" ({off.origin})"
    message = (
        f"is set but FP8 GEMMs are off: precision.gemm.fp8 is false{reason}; "
        "write precision.gemm.fp8: true, or remove the setting (null takes back what a base file set)"
    )
    return _first_set(tree, inert, message, "precision.gemm.fp8")


def _fp8_gradients_off_but_set(tree: Node) -> list[Problem]:
    """Likewise for how FP8 gradients are reduced while gradients are stored in high precision."""
    stored = tree.find(("precision", "gradient", "format"))
    if stored is None or stored.value != "high_precision":
        return []
    reason = "" if stored.origin.explicit else f" ({stored.origin})"
    message = (
        f"is set but gradients are stored in high precision: precision.gradient.format is "
        f"high_precision{reason}; write precision.gradient.format: e4m3, or remove the setting "
        "(null takes back what a base file set)"
    )
    return _first_set(tree, [("precision", "gradient", "fp8")], message, "precision.gradient.format")


def _grad_weight_operands_off_but_set(tree: Node) -> list[Problem]:
    """Likewise for the operands of a weight gradient that is multiplied in high precision."""
    off = tree.find(("precision", "gemm", "grad_weight", "fp8"))
    if off is None or off.value is not False:
        return []
    reason = "" if off.origin.explicit else f" ({off.origin})"
    message = (
        f"is set but weight gradients multiply unquantised operands: precision.gemm.grad_weight.fp8 is "
        f"false{reason}; remove one of the two"
    )
    inert: list[tuple[str, ...]] = [
        ("precision", "gemm", "grad_weight", name) for name in ("grad_output", "x")
    ]
    return _first_set(tree, inert, message, "precision.gemm.grad_weight.fp8")


def _bound_set_but_unread(tree: Node) -> list[Problem]:
    """Likewise for the bound on AdamW's steps where no moment is rounded, or the rule is another."""
    path = ("precision", "state", "bounded_update")
    if says_something(tree, *path):
        return []
    name = tree.find(("optimizer", "name"))
    if name is not None and name.value not in rules_that_read("bounded_update"):
        switch, reason = "optimizer.name", f"bounds steps of AdamW: optimizer.name is {name.value}"
    else:
        switch, reason = "precision.state.exp_avg.format", "bounds steps of rounded moments: both are fp32"
    return _first_set(tree, [path], f"is set but {reason}; remove it", switch)


def _first_set(tree: Node, inert: list[tuple[str, ...]], message: str, switch: str) -> list[Problem]:
    """The first of the ``inert`` paths that a person wrote, as a problem; ``switch`` is what turns it off."""
    for path in inert:
        if tree.explicit(path):
            return [Problem(_first_explicit_leaf(tree, path), message, (switch,))]
    return []


def _first_explicit_leaf(tree: Node, path: tuple[str, ...]) -> tuple[str, ...]:
    node = tree.find(path)
    while node is not None and isinstance(node.value, dict):
        path = (*path, next(key for key in node.value if tree.explicit((*path, key))))
        node = tree.find(path)
    return path


def _origins(config: Config, tree: Node, table: KeyTable) -> dict[str, Origin]:
    """Origin of every leaf of ``config``; an absent optional section (``rope_scaling``) counts as one
    leaf."""
    origins: dict[str, Origin] = {}
    absent: list[tuple[str, ...]] = []
    for key in table.keys.values():
        if any(key.path[: len(path)] == path for path in absent):
            continue
        if key.is_section:
            if not (key.optional and value_at(config, key.path) is None):
                continue
            absent.append(key.path)
        node = tree.find(key.path)
        origins[key.name] = DEFAULT if node is None else node.origin
    return origins


def value_at(config: Config, path: Sequence[str]) -> Any:
    """The value (or section) of ``config`` at ``path``."""
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


def _to_node(value: Any, origin: Origin, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{origin}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        children = {_key(key, origin): _to_node(child, origin, depth + 1) for key, child in value.items()}
        return Node(children, origin, 1 + sum(child.size for child in children.values()))
    if isinstance(value, (list, tuple)):
        entries = [_to_node(child, origin, depth + 1) for child in value]
        return Node(entries, origin, 1 + sum(entry.size for entry in entries))
    if isinstance(value, str):
        return Node(_checked(value, origin), origin)
    if value is None or type(value) in (bool, int, float):
        return Node(value, origin)
    raise ConfigError(f"{origin}: a value of type {type(value).__name__} cannot be in a config")


def _key(key: Any, origin: Origin) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{origin}: key {key!r:.40} is not text; keys are names such as  steps")
    return _checked(key, origin)


def _checked(text: str, origin: Origin) -> str:
    try:
        return check_text(text)
    except ScalarError as error:
        raise ConfigError(f"{origin}: {error}") from error
