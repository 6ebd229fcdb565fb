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
from fp8train.config.inert import unread_settings, without_what_later_places_turn_off
from fp8train.config.keys import KeyTable, key_table
from fp8train.config.length import length_problems
from fp8train.config.loader import load_file
from fp8train.config.messages import problems_of, raise_problems
from fp8train.config.misspelt import rename_misspelt_sections
from fp8train.config.nodes import DEFAULT, Node, Origin, Path, merge
from fp8train.config.overrides import OverrideError, parse_override
from fp8train.config.presets import Problem, apply_presets
from fp8train.config.scalars import ScalarError, check_text
from fp8train.config.schema import Config
from fp8train.config.world import world_problems
from fp8train.config.yaml_tree import MAX_DEPTH


@dataclass(frozen=True)
class ResolvedConfig:
    """A config and where each of its values came from.

    ``origins`` has one entry per leaf, by dotted key. ``sources`` lists the files read, later ones laid over
    earlier ones. ``taken_back`` says, a line each, which values of files are not read because of a place over
    them.
    """

    config: Config
    origins: Mapping[str, Origin]
    sources: tuple[str, ...]
    taken_back: tuple[str, ...]


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
    root, taken_back = without_what_later_places_turn_off(root, table, sources)
    tree, problems = apply_presets(root)
    problems += unread_settings(root, tree, table)
    config = _validate(tree, table, problems, [error.meant or "" for error in refused])
    raise_problems([*misspelt, *problems], tree, sources, [(error.key, str(error)) for error in refused])
    assert config is not None
    return ResolvedConfig(config, _origins(config, tree, table), sources, taken_back)


def _validate(tree: Node, table: KeyTable, problems: list[Problem], misspelt: Sequence[str]) -> Config | None:
    """The config, or None with what is wrong added to ``problems``; nothing where keys are missing that
    ``misspelt`` ones explain."""
    try:
        config = Config.model_validate(tree.plain())
    except ValidationError as error:
        told = [problem.path for problem in problems]
        problems += [
            problem
            for problem in problems_of(error, tree, table, misspelt)
            if not any(_within(path, problem) for path in told)
        ]
        if not problems and not misspelt:  # a preset that fills too little: ours to mend, as pydantic says
            raise
        return None
    for found in (*length_problems(config), *world_problems(config)):
        key, *related = found.keys
        problems.append(Problem(tuple(key.split(".")), found.message, tuple(related)))
    return config


def _within(path: Path, problem: Problem) -> bool:
    """Whether a problem of the schema is about the setting at ``path``, or its section, alone: that nothing
    reads the setting has been told already."""
    return path[: len(problem.path)] == problem.path[: len(path)] and len(problem.path) > 1


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
