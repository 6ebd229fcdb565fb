"""Sections whose name is misspelt, read as what was meant.

With ``modeel:`` for ``model:`` everything that stands below it would go unchecked, and everything that it
should have set would be missing. So such a section is reported and read under the name that it stands for:
one look then shows what is wrong inside it too. The config is refused either way.
"""

from __future__ import annotations

from fp8train.config.hints import meant_key, suggest_key
from fp8train.config.keys import KeyTable
from fp8train.config.nodes import Node
from fp8train.config.presets import Problem


def rename_misspelt_sections(
    root: Node, table: KeyTable, path: tuple[str, ...] = ()
) -> tuple[Node, list[Problem]]:
    """``root``, the section at ``path``, with misspelt sections below it renamed, and one problem for each.

    A section is renamed if its name is close to that of a section that the same place may have and does not.
    """
    if not isinstance(root.value, dict):
        return root, []
    problems: list[Problem] = []
    children: dict[str, Node] = {}
    for name, child in root.value.items():
        own = (*path, name)
        key = table.keys.get(".".join(own))
        if key is None and isinstance(child.value, dict) and (meant := meant_key(table, own)):
            known = table.keys[meant]
            if known.is_section and known.path[:-1] == path and known.path[-1] not in root.value:
                message = f"unknown key; {suggest_key(table, own)}"
                problems.append(Problem(own, message, origin=child.origin))
                name, key = known.path[-1], known
        if key is not None and key.is_section:
            child, below = rename_misspelt_sections(child, table, key.path)
            problems += below
        children[name] = child
    return Node(children, root.origin, root.size), problems
