"""The keys of a config as a flat table, and what may be written for each.

Everything here is read off the schema's own JSON Schema, so a message, the reference page and an editor's
completion cannot disagree with what is validated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fp8train.config.limits import LIMITS
from fp8train.config.nodes import dotted
from fp8train.config.presets import filled_keys
from fp8train.config.schema import Config

Fragment = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One key of the config: a section or a value.

    ``fragment`` is its JSON Schema with references resolved, ``required`` whether the user must write it,
    ``optional`` whether null is a legal value.
    """

    path: tuple[str, ...]
    fragment: Fragment
    is_section: bool
    required: bool
    optional: bool

    @property
    def name(self) -> str:
        """The key's name as people write it, ``section.key``."""
        return dotted(self.path)

    @property
    def description(self) -> str:
        """The documentation of the field, on one line."""
        return " ".join(self.fragment.get("description", "").split())

    @property
    def example(self) -> Any:
        """A value that could be written, or None."""
        return next(iter(self.fragment.get("examples", ())), None)


class KeyTable:
    """All keys of the schema, in the order in which it declares them."""

    def __init__(self) -> None:
        self._schema = Config.model_json_schema()
        self._filled = filled_keys()
        self.keys = {key.name: key for key in self._walk(self._schema, ())}

    def _walk(self, section: Fragment, path: tuple[str, ...]) -> Iterator[Key]:
        for name, raw in section["properties"].items():
            fragment = self._follow(raw)
            below = (*path, name)
            is_section = "properties" in fragment
            required = name in section.get("required", ()) and dotted(below) not in self._filled
            children = list(self._walk(fragment, below)) if is_section else []
            if is_section:
                required = required and any(child.required for child in children)
            yield Key(below, fragment, is_section, required, _allows_null(raw))
            yield from children

    def _follow(self, raw: Fragment) -> Fragment:
        """The fragment behind ``$ref`` and ``X | null``, with the field's own description."""
        choices = [choice for choice in raw.get("anyOf", ()) if choice.get("type") != "null"]
        inner = choices[0] if len(choices) == 1 else raw
        if "$ref" in inner:
            inner = self._schema["$defs"][inner["$ref"].rsplit("/", 1)[1]]
        fragment = {
            **inner,
            **{key: value for key, value in raw.items() if key not in ("$ref", "anyOf") or inner is raw},
        }
        if "$ref" in (entry := fragment.get("items", {})):
            fragment["items"] = self._follow(entry)
        return fragment

    def leaves(self) -> list[Key]:
        """The keys that hold values."""
        return [key for key in self.keys.values() if not key.is_section]

    def children(self, path: Sequence[str]) -> list[Key]:
        """The keys directly under the section at ``path`` (empty: the sections)."""
        return [key for key in self.keys.values() if key.path[:-1] == tuple(path)]

    def locate(self, location: Sequence[str | int]) -> tuple[tuple[str | int, ...], Fragment | None]:
        """Match a pydantic error location with the schema.

        Pydantic adds the branch of a union (``literal['auto']``) to a location; those elements are dropped.

        Returns:
            The location in the file, and the JSON Schema of the value there (None for an unknown key).
        """
        path: list[str | int] = []
        fragment: Fragment = self._schema
        for step in location:
            if isinstance(step, int):
                fragment = self._follow(fragment.get("items") or fragment.get("prefixItems", [{}])[0])
            elif "properties" not in fragment:
                break
            elif step in fragment["properties"]:
                fragment = self._follow(fragment["properties"][step])
            else:
                return (*path, step), None
            path.append(step)
        return tuple(path), fragment


@cache
def key_table() -> KeyTable:
    """The one table of this schema: walking it takes longer than reading and checking a file."""
    return KeyTable()


def _allows_null(raw: Fragment) -> bool:
    return any(choice.get("type") == "null" for choice in raw.get("anyOf", ()))


def describe(fragment: Fragment, *, optional: bool = False, instead_of: object = None) -> str:
    """What may be written for a value, in words: ``a whole number >= 1``, ``one of: gpt, llama``. A limit of
    :mod:`fp8train.config.limits` is only worth a word ``instead_of`` a value beyond it."""
    text = _describe(fragment, instead_of)
    return f"{text}, or null" if optional else text


def _describe(fragment: Fragment, instead_of: object = None) -> str:
    if "anyOf" in fragment:
        return " or ".join(_describe(choice, instead_of) for choice in fragment["anyOf"])
    if "properties" in fragment:
        return f"a section with the keys {', '.join(fragment['properties'])}"
    if "const" in fragment:
        return str(fragment["const"])
    if "enum" in fragment:
        return f"one of: {', '.join(map(str, fragment['enum']))}"
    kind = fragment.get("type")
    if kind == "null":
        return "null"
    if kind == "boolean":
        return "true or false"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(fragment, instead_of)
    if kind == "array":
        if "prefixItems" in fragment:
            entries = fragment["prefixItems"]
            return f"a list of {len(entries)} entries, each {_describe(entries[0])}"
        entry = fragment["items"]
        if "properties" in entry:
            return f"a list of {{{', '.join(f'{name}: ...' for name in entry['required'])}}}"
        return f"a list, each entry {_describe(entry)}"
    assert kind == "string", fragment
    if "pattern" in fragment:
        return (
            f"text of letters, digits, dot, dash and underscore (at most {fragment['maxLength']} characters)"
        )
    return "text"


def _bounds(fragment: Fragment, instead_of: object) -> str:
    parts = []
    for keyword, sign in (
        ("minimum", ">="),
        ("exclusiveMinimum", ">"),
        ("maximum", "<="),
        ("exclusiveMaximum", "<"),
    ):
        bound = fragment.get(keyword)
        if bound in LIMITS and not (isinstance(instead_of, int) and instead_of > bound):
            continue
        if bound is not None and bound != 2**63:
            parts.append(f"{sign} {bound}" if isinstance(bound, int) else f"{sign} {bound:g}")
        elif bound is not None:
            parts.append("< 2^63")
    if parts[:1] and parts[-1] == "< 2^63" and len(parts) > 1:
        parts.pop()  # the machine's own limit is only worth a word where it is the only one
    return f" {' and '.join(parts)}" if parts else ""
