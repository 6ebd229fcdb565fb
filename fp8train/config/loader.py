"""Config files, with ``base:`` inclusion.

A file may build on others: ``base: other.yaml``, or a list of which the later win, relative to the including
file. Everything the file itself says is laid over them (mappings merge, lists and scalars replace, null takes
back).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath

from fp8train.config.errors import ConfigError
from fp8train.config.nodes import Node, Origin, merge
from fp8train.config.scalars import shorten
from fp8train.config.yaml_tree import parse_text

MAX_BYTES = 1_000_000
"""Largest config file read."""
MAX_INCLUDES = 100
"""Most files merged through ``base:``, repeats counted."""


def load_file(path: str | FilePath) -> tuple[Node, tuple[str, ...]]:
    """Read a config file and everything it includes.

    Returns:
        The merged top-level mapping (without ``base``) and the files read, in the order in which they were
        laid over each other: the later wins, ``path`` itself is last.

    Raises:
        ConfigError: unreadable file, bad YAML (``file:line:column``), duplicate key, tag, or an inclusion
            cycle.
    """
    sources: list[str] = []
    root = _load_with_bases(FilePath(path), (), sources, None)
    return root, tuple(sources)


def _load_with_bases(
    path: FilePath, chain: tuple[FilePath, ...], sources: list[str], included_at: Origin | None
) -> Node:
    where = f"{included_at}: base: " if included_at else ""
    resolved = _resolve(path, where)
    if resolved in chain:
        cycle = " -> ".join(str(step) for step in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{where}files include each other in a circle: {cycle}")
    if len(sources) + len(chain) >= MAX_INCLUDES:
        raise ConfigError(
            f"{where}more than {MAX_INCLUDES} files are included; keep the chain of base: files shorter"
        )
    root = parse_text(_read(path, where), str(path))
    base = root.child("base")
    merged = None
    for entry in _base_entries(base):
        assert isinstance(entry.value, str)
        below = _load_with_bases(path.parent / entry.value, (*chain, resolved), sources, entry.origin)
        merged = below if merged is None else merge(merged, below)
    if base is not None:
        assert isinstance(root.value, dict)
        root = replace(root, value={key: child for key, child in root.value.items() if key != "base"})
    sources.append(str(path))
    return root if merged is None else merge(merged, root)


def _resolve(path: FilePath, where: str) -> FilePath:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}cannot follow the path {shorten(str(path), 200)}: {error}") from error


def _base_entries(base: Node | None) -> list[Node]:
    if base is None:
        return []
    entries = base.value if isinstance(base.value, list) else [base]
    for entry in entries:
        if not isinstance(entry.value, str) or not entry.value:
            raise ConfigError(
                f"{entry.origin}: base: expected a file name or a list of them; for example  base: llama.yaml"
            )
    if not entries:
        raise ConfigError(f"{base.origin}: base: the list is empty; name a file or remove the line")
    return entries


def _read(path: FilePath, where: str) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"{where}{path} is a folder; name a config file (*.yaml)")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        beside = (
            sorted(other.name for other in path.parent.glob("*.yaml"))[:8] if path.parent.is_dir() else []
        )
        hint = f"; {path.parent} holds {', '.join(beside)}" if beside else ""
        raise ConfigError(f"{where}config file not found: {path}{hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}cannot read {shorten(str(path), 200)}: {error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{where}{path}: larger than {MAX_BYTES:,} bytes; this is not a config file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error
