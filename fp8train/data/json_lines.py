"""JSONL files whose every line matters: evaluation tasks and conversations, small and made on purpose.

Pretraining text is read by :mod:`fp8train.data.sources` instead, which skips and counts what is malformed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8train.data.errors import DataError


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``file:line``, object) of every line that is not blank.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object in UTF-8; names file and line.
    """
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{file}:{number}", _record(line, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate is legal JSON, but no text
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise DataError(f"{place}: a lone surrogate, which UTF-8 cannot hold") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: not a JSON object")
    return record
