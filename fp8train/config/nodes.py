"""Values that remember where they came from.

A config is put together from files, presets and the command line, and every message about it must name the
file and line to mend. So nothing is plain until the very end: loader, overrides and presets all produce
:class:`Node` trees, one merge rule joins them, and :meth:`Node.plain` hands the result to pydantic. The
trade-off against a bare dict plus a table of line numbers: a few hundred small objects per config, and in
exchange no path bookkeeping when trees are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scalar = str | int | float | bool | None
Plain = Scalar | dict[str, "Plain"] | list["Plain"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was set.

    ``detail`` is the file for ``file``, the preset's name (``model.family=llama``) for ``preset``, the
    formula for ``derived``, the variable for ``environment``, and empty for ``default`` and ``command line``.
    ``line`` and ``column`` count from 1.
    """

    kind: Literal["default", "preset", "derived", "environment", "file", "command line"]
    detail: str = ""
    line: int | None = None
    column: int | None = None

    @property
    def explicit(self) -> bool:
        """Whether a person wrote the value, in a file or on the command line."""
        return self.kind in ("file", "command line")

    def __str__(self) -> str:
        if self.kind == "file":
            return self.detail if self.line is None else f"{self.detail}:{self.line}"
        return f"{self.kind} {self.detail}" if self.detail else self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Node:
    """One YAML value: a scalar, a mapping or a list of nodes, with its origin.

    ``size`` counts the nodes of the tree below, aliases expanded: the loader bounds it, so that walking a
    tree is cheap.
    """

    value: Scalar | dict[str, Node] | list[Node]
    origin: Origin
    size: int = 1

    def plain(self) -> Plain:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, key: str | int) -> Node | None:
        """The entry under ``key`` (mapping) or at index ``key`` (list), if there is one."""
        if isinstance(self.value, dict) and isinstance(key, str):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def find(self, path: Sequence[str | int]) -> Node | None:
        """The node at ``path``, if there is one."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def nearest_origin(self, path: Sequence[str | int]) -> Origin:
        """Origin of the deepest existing node along ``path``: where to point when the value itself is
        missing."""
        node = self
        for key in path:
            following = node.child(key)
            if following is None:
                break
            node = following
        return node.origin

    def explicit(self, path: Sequence[str | int]) -> bool:
        """Whether a person gave a value (other than null) to ``path`` or to something below it."""
        node = self.find(path)
        if node is None or node.value is None:
            return False
        if isinstance(node.value, dict):
            return any(node.explicit((key,)) for key in node.value)
        return node.origin.explicit


def nest(path: Sequence[str], leaf: Node) -> Node:
    """``leaf`` wrapped in one mapping per element of ``path``, all with the leaf's origin."""
    for key in reversed(path):
        leaf = Node({key: leaf}, leaf.origin, leaf.size + 1)
    return leaf


def merge(under: Node, over: Node, *, null_takes_back: bool = True) -> Node:
    """``over`` laid on ``under``: mappings merge key by key, anything else replaces.

    A merged mapping keeps pointing at a file when one of the two came from a file. With ``null_takes_back`` a
    null in ``over`` removes what ``under`` set, so that the default (or preset) applies again. A null over
    nothing stays null and is validated as such.
    """
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    children = dict(under.value)
    for key, child in over.value.items():
        below = children.get(key)
        if below is None:
            children[key] = child
        elif child.value is None and below.value is not None and null_takes_back:
            del children[key]
        else:
            children[key] = merge(below, child, null_takes_back=null_takes_back)
    origin = under.origin if under.origin.kind == "file" and over.origin.kind != "file" else over.origin
    return Node(children, origin, 1 + sum(child.size for child in children.values()))


def dotted(path: Sequence[str | int]) -> str:
    """``("data", "blend", 0, "prefix")`` as ``data.blend[0].prefix``."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else key)
    return text
