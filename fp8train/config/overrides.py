"""``section.key=value`` on the command line.

The value is parsed by the rules of a file (``train.compile=off`` is text, ``data.split=[1, 0, 0]`` a list,
``model.rope_scaling={factor: 8.0}`` a mapping that merges); ``key=null`` takes back what the file set.
"""

from __future__ import annotations

import difflib

from fp8train.config.errors import ConfigError
from fp8train.config.hints import meant_key, suggest_key
from fp8train.config.keys import KeyTable
from fp8train.config.nodes import Node, Origin, nest
from fp8train.config.scalars import shorten
from fp8train.config.yaml_tree import parse_value

COMMAND_LINE = Origin("command line")


class OverrideError(ConfigError):
    """One override is wrong. ``key`` is what it names, ``meant`` the key that it probably stands for."""

    def __init__(self, message: str, key: str, meant: str | None = None) -> None:
        super().__init__(message)
        self.key, self.meant = key, meant


def parse_override(text: str, table: KeyTable) -> Node:
    """The tree that one override stands for.

    Raises:
        OverrideError: no ``=``, no value, bad YAML in the value, or a key the schema does not have (with the
            nearest one).
    """
    name = text.partition("=")[0].strip()
    key = shorten(ascii(name)[1:-1], 80)
    try:
        return _parse(text, table)
    except OverrideError:
        raise
    except ConfigError as error:
        raise OverrideError(str(error), key, name) from error


def _parse(text: str, table: KeyTable) -> Node:
    name, equals, value = text.partition("=")
    name = name.strip()
    shown = shorten(ascii(text)[1:-1], 80)
    if not equals or not name:
        raise ConfigError(f"command line: {shown}: not section.key=value{_without_value(name, table)}")
    path = tuple(name.split("."))
    if name == "base":
        raise ConfigError(
            "command line: base: can only be set in a file; write a file with  base: ...  on its first line"
        )
    if name not in table.keys:
        key = shorten(ascii(name)[1:-1], 80)
        suggestion, meant = _suggest(path, table)
        raise OverrideError(f"command line: {key}: unknown key; {suggestion}", key, meant)
    node = parse_value(value, COMMAND_LINE, name) if _encodable(value) else None
    if node is None and not value.strip():
        raise ConfigError(
            f"command line: {name}=: no value; write {name}=null to unset it or {name}='\"\"' for empty text"
        )
    if node is None:
        raise ConfigError(f"command line: {shown}: no readable value; put it in quotes")
    return nest(path, node)


def _encodable(value: str) -> bool:
    """False for bytes of the command line that were not UTF-8 (Python hands them over as unpaired
    surrogates)."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _without_value(name: str, table: KeyTable) -> str:
    if name in table.keys and table.keys[name].is_section:
        return f"; name a key of the section, for example {table.children(table.keys[name].path)[0].name}=..."
    if name in table.keys:
        return f"; write {name}=VALUE"
    match = difflib.get_close_matches(name, table.keys, n=1, cutoff=0.6)
    return f"; did you mean {match[0]}=VALUE?" if match else ""


def _suggest(path: tuple[str, ...], table: KeyTable) -> tuple[str, str | None]:
    """The end of the message about an unknown key, and the key that was meant."""
    for end in range(1, len(path)):
        parent = table.keys.get(".".join(path[:end]))
        if parent is not None and not parent.is_section:
            return f"{parent.name} is a single value; write {parent.name}=...", None
    meant = meant_key(table, path)
    if meant is None:
        for end in range(1, len(path)):
            section = ".".join(path[:end])
            if section not in table.keys and (known := meant_key(table, path[:end])):
                return f"there is no section {section}; did you mean {known}?", known
    return suggest_key(table, path), meant
