"""What happens to input text before it is tokenised, and the count of it.

Repaired: a byte-order mark is dropped, NUL bytes are removed, CRLF becomes LF. Skipped: documents that are
empty, are not UTF-8, or hold a line longer than the limit (embedded binary data, minified code). JSONL lines
that do not parse or lack the text are skipped too. Everything is counted, with the first few names, and
nothing else is changed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

EMPTY = "skipped: empty"
NOT_UTF8 = "skipped: not UTF-8"
LONG_LINE = "skipped: line too long"
NOT_JSON = "skipped: not JSON"
NO_TEXT = "skipped: no text under the key"
BOM = "repaired: byte-order mark"
NUL = "repaired: NUL bytes"
CRLF = "repaired: CRLF line ends"

MAX_EXAMPLES = 3
_BOM = b"\xef\xbb\xbf"


@dataclass
class Report:
    """Documents by what happened to them; a document may be repaired in several ways.

    Attributes:
        counts: Number of documents per reason.
        examples: The first few names per reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        """Count one document under ``reason``, and keep its name as an example while there are few."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < MAX_EXAMPLES:
            names.append(name)

    def merge(self, later: Report) -> None:
        """Add what was counted later in document order."""
        for reason, count in later.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.examples.setdefault(reason, [])
            names.extend(later.examples[reason][: MAX_EXAMPLES - len(names)])

    def lines(self) -> list[str]:
        """One printable line per reason, most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [f"{reason}: {count} (e.g. {', '.join(self.examples[reason])})" for reason, count in ordered]


def clean(data: bytes, name: str, report: Report, *, max_line_bytes: int) -> str | None:
    """Repaired text of one document, or None if it is skipped.

    Args:
        data: The document's bytes.
        name: What the report calls it.
        report: Counted into.
        max_line_bytes: Longest line accepted, in UTF-8 bytes.
    """
    repairs = []
    if data.startswith(_BOM):
        data = data.removeprefix(_BOM)
        repairs.append(BOM)
    if b"\x00" in data:
        data = data.replace(b"\x00", b"")
        repairs.append(NUL)
    if b"\r\n" in data:
        data = data.replace(b"\r\n", b"\n")
        repairs.append(CRLF)
    if not data.strip():
        report.note(EMPTY, name)
        return None
    if len(data) > max_line_bytes and max(map(len, data.split(b"\n"))) > max_line_bytes:
        report.note(LONG_LINE, name)
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        report.note(NOT_UTF8, name)
        return None
    for repair in repairs:
        report.note(repair, name)
    return text


def clean_json_line(
    line: bytes, name: str, report: Report, *, text_key: str, max_line_bytes: int
) -> str | None:
    """Repaired text of one JSONL line, or None if it is skipped.

    Args:
        line: One line, with or without its line end.
        name: What the report calls it.
        report: Counted into.
        text_key: Key of the text in the JSON object.
        max_line_bytes: Longest line accepted inside the text.
    """
    if line.startswith(_BOM):
        report.note(BOM, name)
        line = line.removeprefix(_BOM)
    if not line.strip():
        report.note(EMPTY, name)
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        report.note(NOT_UTF8, name)
        return None
    except (ValueError, RecursionError):
        report.note(NOT_JSON, name)
        return None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        report.note(NO_TEXT, name)
        return None
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # an escaped lone surrogate
        report.note(NOT_UTF8, name)
        return None
    return clean(data, name, report, max_line_bytes=max_line_bytes)
