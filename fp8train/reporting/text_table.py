"""Aligned text tables: readable in a file, a pipe and a terminal without colour."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns padded to their width; the first ``left`` aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = []
    for row in (heading, ["-" * width for width in widths], *rows):
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(width) if i < left else c.rjust(width) for i, (c, width) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
