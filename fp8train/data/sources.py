"""Which files a dataset is made of, and how they are cut into units of work.

A text file is one document; a ``.jsonl`` file holds one document per line. Units depend on the files alone,
never on the number of workers, so the documents and their order are the same however many processes encode
them. A JSONL file is cut at fixed byte positions, and a unit owns the lines that *start* inside it: nobody
has to read the file to plan the work.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from fp8train.data.cleaning import LONG_LINE, Report, clean, clean_json_line
from fp8train.data.errors import DataError

DEFAULT_PATTERNS = ("*.txt", "*.jsonl")
UNIT_BYTES = 1 << 20
_UNIT_FILES = 256
_MAX_JSON_LINE = 1 << 28
_STDLIB_EXCLUDED = frozenset(
    {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "ensurepip", "__pycache__"}
)


@dataclass(frozen=True)
class Piece:
    """Part of one file: all of a text file, or the JSONL lines that start in bytes ``[start, stop)``."""

    path: str
    start: int
    stop: int
    jsonl: bool


Unit = tuple[Piece, ...]


def find_files(inputs: Sequence[str | Path], patterns: Sequence[str] = DEFAULT_PATTERNS) -> list[Path]:
    """Files named by ``inputs``: files as they are, folders searched recursively.

    Args:
        inputs: Files and folders, in the order their documents shall have.
        patterns: Glob patterns of file names (or paths inside the folder) to take from folders.

    Returns:
        Files; those of one folder sorted by path. Symbolic links to folders are not followed.

    Raises:
        DataError: An input does not exist, or a folder holds no file that matches.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found = [
                path
                for path in _walk(entry)
                if any(
                    fnmatch(path.name, p) or fnmatch(path.relative_to(entry).as_posix(), p) for p in patterns
                )
            ]
            if not found:
                raise DataError(f"{entry}: no file in this folder matches {', '.join(patterns)}")
            files += sorted(found, key=lambda path: path.relative_to(entry).as_posix())
        elif entry.is_file():
            files.append(entry)
        else:
            raise DataError(f"input {entry}: no such file or folder")
    if not files:
        raise DataError("no input: name at least one file or folder")
    return files


def stdlib_corpus() -> list[Path]:
    """The running Python's own standard library as a corpus: about 650 ``.py`` files, 12 MB, no download.

    Tests, bundled wheels and site-packages are left out; sorted by path, so the list is the same on every
    machine with the same Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root, _STDLIB_EXCLUDED) if path.suffix == ".py"]
    if not files:
        raise DataError(f"{root}: this Python has no standard library sources on disk")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def plan_units(files: Sequence[Path]) -> list[Unit]:
    """Cut ``files`` into units of about ``UNIT_BYTES``, in document order.

    Raises:
        DataError: A file is gone or unreadable.
    """
    units: list[Unit] = []
    batch: list[Piece] = []
    batch_bytes = 0
    for path in files:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"input {path}: {error.strerror or error}") from error
        if path.suffix == ".jsonl":
            pieces = [
                Piece(str(path), start, min(start + UNIT_BYTES, size), True)
                for start in range(0, max(size, 1), UNIT_BYTES)
            ]
        else:
            pieces = [Piece(str(path), 0, size, False)]
        for piece in pieces:
            length = piece.stop - piece.start
            if batch and (batch_bytes + length > UNIT_BYTES or len(batch) == _UNIT_FILES):
                units.append(tuple(batch))
                batch, batch_bytes = [], 0
            batch.append(piece)
            batch_bytes += length
    if batch:
        units.append(tuple(batch))
    return units


def unit_bytes(unit: Unit) -> int:
    """Number of input bytes of a unit."""
    return sum(piece.stop - piece.start for piece in unit)


def read_unit(unit: Unit, report: Report, *, text_key: str, max_line_bytes: int) -> Iterator[str]:
    """Cleaned documents of a unit, in order; what is skipped or repaired is counted into ``report``.

    Raises:
        DataError: A file cannot be read.
    """
    for piece in unit:
        try:
            if piece.jsonl:
                yield from _read_jsonl(piece, report, text_key, max_line_bytes)
            else:
                with open(piece.path, "rb") as stream:
                    text = clean(stream.read(), piece.path, report, max_line_bytes=max_line_bytes)
                if text is not None:
                    yield text
        except OSError as error:
            raise DataError(f"input {piece.path}: {error.strerror or error}") from error


def _read_jsonl(piece: Piece, report: Report, text_key: str, max_line_bytes: int) -> Iterator[str]:
    with open(piece.path, "rb") as stream:
        if piece.start:
            stream.seek(piece.start - 1)
            _skip_line(stream)  # the line that began before belongs to the unit before
        while (position := stream.tell()) < piece.stop:
            name = f"{piece.path} at byte {position}"
            line = stream.readline(_MAX_JSON_LINE)
            if len(line) == _MAX_JSON_LINE and not line.endswith(b"\n"):
                report.note(LONG_LINE, name)
                _skip_line(stream)
                continue
            text = clean_json_line(line, name, report, text_key=text_key, max_line_bytes=max_line_bytes)
            if text is not None:
                yield text


def _skip_line(stream: BinaryIO) -> None:
    while (part := stream.readline(UNIT_BYTES)) and not part.endswith(b"\n"):
        pass


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # os.walk would silently leave the folder out
        raise DataError(f"input {error.filename}: {error.strerror or error}") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in excluded]
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield path
