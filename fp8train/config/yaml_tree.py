"""Strict YAML text as :class:`~fp8train.config.nodes.Node` trees.

The parser is ruamel.yaml's (YAML 1.2, pure Python); only its *events* are used. Building the tree ourselves
from events costs a hundred lines and buys what a config reader needs and no library gives together: duplicate
keys refused with both lines, every tag refused before anything could be constructed, aliases bounded by their
expanded size, no recursion that an input controls, and a position for every key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from fp8train.config.errors import ConfigError
from fp8train.config.nodes import Node, Origin
from fp8train.config.scalars import ScalarError, check_text, parse_plain, shorten

MAX_NODES = 20_000
"""Most values in one file, aliases expanded (an "alias bomb" grows exponentially)."""
MAX_DEPTH = 50
"""Deepest nesting."""


def parse_text(text: str, source: str) -> Node:
    """Parse the text of one file; ``source`` is its name in messages.

    Raises:
        ConfigError: a syntax error (``file:line:column``), duplicate key, tag, unbounded alias, an empty text
            or a top level that is not a mapping.
    """
    root = _Builder(source, text).build()
    if root is None or root.value is None:
        raise ConfigError(
            f"{source}: the file is empty; "
            "a config is a mapping of sections, at least model, data, optimizer and train"
        )
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else "a single value"
        raise ConfigError(
            f"{root.origin}: the top level is {kind}; a config is a mapping of sections such as  model: ..."
        )
    return root


def parse_value(text: str, origin: Origin, key: str) -> Node | None:
    """Parse the value of ``key`` given outside a file (a command-line override); None if there is none.

    Raises:
        ConfigError: bad YAML, or a comment that would silently cut the value short.
    """
    return _Builder(f"{origin}: {key}", text, fixed_origin=origin).build()


@dataclass
class _Open:
    """A mapping or list whose end has not been read."""

    origin: Origin
    anchor: str | None
    value: dict[str, Node] | list[Node]
    size: int = 1
    key: tuple[str, Origin] | None = None


class _Builder:
    """Turns the parser's events into nodes, without recursion."""

    def __init__(self, source: str, text: str, fixed_origin: Origin | None = None) -> None:
        self.source = source
        self.text = text
        self.fixed_origin = fixed_origin
        self.stack: list[_Open] = []
        self.anchors: dict[str, Node] = {}
        self.root: Node | None = None
        self.root_end = 0
        self.num_documents = 0

    def build(self) -> Node | None:
        """The document's root node; None for an empty document."""
        for event in self._events():
            if isinstance(event, DocumentStartEvent):
                self._document_start(event)
            elif isinstance(event, (MappingStartEvent, SequenceStartEvent)):
                self._open(event)
            elif isinstance(event, ScalarEvent):
                self._scalar(event)
            elif isinstance(event, AliasEvent):
                self._alias(event)
            elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
                closed = self.stack.pop()
                self._attach(Node(closed.value, closed.origin, closed.size), closed.anchor, event)
            elif isinstance(event, DocumentEndEvent):
                self._refuse_trailing_comment()
        return self.root

    def _events(self) -> Iterator[Any]:
        for number, line in enumerate(self.text.split("\n"), start=1):
            if line.startswith("%"):
                raise ConfigError(
                    f"{self._at(number)}: YAML directives (%...) are not supported; remove the line"
                )
        try:
            yield from YAML(typ="safe", pure=True).parse(self.text)
        except MarkedYAMLError as error:
            raise ConfigError(self._syntax_message(error)) from error
        except (YAMLError, ValueError, OverflowError, AssertionError, IndexError, TypeError) as error:
            # ruamel.yaml leaks Python errors for some broken escapes ("\UFFFFFFFF": OverflowError from chr).
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.source}: YAML syntax error: {shorten(reason, 200)}") from error

    def _syntax_message(self, error: MarkedYAMLError) -> str:
        mark = error.problem_mark or error.context_mark
        if mark is None:
            return f"{self.source}: YAML syntax error: {error.problem or error.context}"
        where = self._at(mark.line + 1, mark.column + 1)
        lines = self.text.split("\n")
        line = lines[mark.line] if mark.line < len(lines) else ""
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return f"{where}: tab used for indentation; YAML allows only spaces there"
        context = f" ({error.context})" if error.context else ""
        return f"{where}: YAML syntax error: {shorten(f'{error.problem}{context}', 200)}"

    def _at(self, line: int, column: int | None = None) -> str:
        if self.fixed_origin is not None:
            return self.source
        return f"{self.source}:{line}" if column is None else f"{self.source}:{line}:{column}"

    def _origin(self, event: Any) -> Origin:
        if self.fixed_origin is not None:
            return self.fixed_origin
        return Origin("file", self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _fail(self, event: Any, message: str) -> ConfigError:
        return ConfigError(f"{self._at(event.start_mark.line + 1, event.start_mark.column + 1)}: {message}")

    def _document_start(self, event: DocumentStartEvent) -> None:
        self.num_documents += 1
        if self.num_documents > 1:
            raise self._fail(event, "a second document (---) starts here; a config is one document")

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._fail(
                event,
                f"tag {shorten(tag, 60)} is refused: a config holds plain values only; nothing was executed",
            )

    def _open(self, event: Any) -> None:
        self._refuse_tag(event)
        if len(self.stack) >= MAX_DEPTH:
            raise self._fail(event, f"nested deeper than {MAX_DEPTH} levels")
        if self._expects_key():
            raise self._fail(event, "a key must be text, not a list or a mapping")
        is_mapping = isinstance(event, MappingStartEvent)
        self.stack.append(_Open(self._origin(event), event.anchor, {} if is_mapping else []))

    def _expects_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.stack[-1].key is None

    def _scalar(self, event: ScalarEvent) -> None:
        self._refuse_tag(event)
        try:
            value = parse_plain(event.value) if event.style is None else check_text(event.value)
        except ScalarError as error:
            raise self._fail(event, f"{self._key_prefix()}{error}") from error
        if self._expects_key():
            self._key(event, value)
        else:
            self._attach(Node(value, self._origin(event)), event.anchor, event)

    def _key_prefix(self) -> str:
        keys = [level.key[0] for level in self.stack if level.key is not None]
        return f"{shorten('.'.join(keys), 120)}: " if keys else ""

    def _key(self, event: ScalarEvent, value: object) -> None:
        level = self.stack[-1]
        assert isinstance(level.value, dict)
        if not isinstance(value, str):
            raise self._fail(
                event, f"key {shorten(event.value) or 'null'} is not text; keys are names such as  steps:"
            )
        if value == "<<":
            raise self._fail(
                event, "merge keys (<<) are YAML 1.1; use  base: other.yaml  to build on another file"
            )
        if value in level.value:
            first = level.value[value].origin
            also = "" if first.line is None else f" (first at line {first.line})"
            raise self._fail(event, f"{self._key_prefix()}duplicate key {shorten(value)!r}{also}; keep one")
        level.key = (value, self._origin(event))

    def _alias(self, event: AliasEvent) -> None:
        if self._expects_key():
            raise self._fail(event, "a key must be text, not an alias")
        if any(level.anchor == event.anchor for level in self.stack):
            raise self._fail(event, f"alias *{shorten(event.anchor)} refers to a value that contains it")
        node = self.anchors.get(event.anchor)
        if node is None:
            raise self._fail(
                event, f"alias *{shorten(event.anchor)} has no anchor &{shorten(event.anchor)} before it"
            )
        self._attach(replace(node, origin=self._origin(event)), None, event)

    def _attach(self, node: Node, anchor: str | None, event: Any) -> None:
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.stack:
            self.root = node
            self.root_end = event.end_mark.index
            return
        level = self.stack[-1]
        level.size += node.size
        if level.size > MAX_NODES:
            raise self._fail(
                event, f"more than {MAX_NODES:,} values with aliases expanded; this is not a config"
            )
        if isinstance(level.value, list):
            level.value.append(node)
        else:
            assert level.key is not None
            key, key_origin = level.key
            level.value[key] = replace(node, origin=key_origin)
            level.key = None

    def _refuse_trailing_comment(self) -> None:
        """On the command line ``run.dir=a #b`` would lose ``#b`` silently."""
        if self.fixed_origin is not None and self.root is not None and self.text[self.root_end :].strip():
            rest = shorten(self.text[self.root_end :].strip())
            raise ConfigError(
                f"{self.source}: {rest!r} after the value would be ignored; put the value in quotes"
            )
