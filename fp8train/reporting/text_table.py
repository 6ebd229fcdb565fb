"""Aligned text tables, plain and as Markdown: readable in a file, a pipe and a terminal without colour."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns padded to their width; the first ``left`` aligned left, the others right."""
    widths = _widths(heading, rows)
    rule = "  ".join("-" * width for width in widths)
    lines = ["  ".join(_pad(row, widths, left)).rstrip() for row in (heading, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The same as a Markdown table, padded so that its source is readable too."""
    widths = [max(width, 3) for width in _widths(heading, rows)]
    lines = [f"| {' | '.join(_pad(row, widths, left))} |" for row in (heading, *rows)]
    rule = [("-" * width) if i < left else ("-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def _widths(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(heading, *rows, strict=True)]


def _pad(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
