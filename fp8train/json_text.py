"""JSON that may have been damaged or made up: every way in which it can be wrong is one ``ValueError``.

Python's reader lets through what JSON does not have (NaN, a key twice, of which the last wins) and answers
nesting with a ``RecursionError``. Here a file is read up to a size, since one that should hold a few
kilobytes and holds gigabytes is not what its name says, and lines of records one at a time, so that a single
bad one (a torn line, a tail of NUL bytes after a power cut) costs itself and not the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_FILE = 64 << 20
"""Bytes of the largest JSON file that is read; the index of 100,000 tensors takes a sixth of it."""
MAX_LINE = 4 << 20
"""Bytes of the longest record that is read."""
MAX_DEPTH = 50
"""Deepest nesting of a file."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not one object of strict JSON in UTF-8; says which.
    """
    with path.open("rb") as stream:
        data = stream.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"larger than {MAX_FILE >> 20} MiB")
    return parse_object(data)


def parse_object(data: bytes, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in ``data``; not ``strict``: NaN and Infinity too, as Python writes them.

    Raises:
        ValueError: there is none; says why.
    """
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_once if strict else None,
            parse_constant=_refuse_constant if strict else None,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if strict and _is_deep(value):
        raise ValueError("not JSON: nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    """Whether what walks through it with a function that calls itself might not come back."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level if isinstance(one, dict) for inner in one.values()] + [
            inner for one in level if isinstance(one, list) for inner in one
        ]
        if not level:
            return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")


def records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a file of records with its object; None for one that holds none: damaged, longer than
    :data:`MAX_LINE` (the line is empty then), or the last one without its end, which a kill leaves.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            if line.endswith(b"\n"):
                yield line, _record(line)
            elif len(line) < MAX_LINE:
                yield line, None
            else:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield b"", None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_object(line, strict=False)
    except ValueError:
        return None
