"""The ``.idx`` file of a Megatron dataset: where every sequence and document lies in the ``.bin`` file.

Layout (little-endian, no padding), with S sequences and E document boundaries::

    offset      bytes  content
    0           9      magic b"MMIDIDX\\0\\0"
    9           8      uint64 version = 1
    17          1      uint8 dtype code of the tokens
    18          8      uint64 S
    26          8      uint64 E (documents + 1)
    34          4 S    int32 sequence lengths, in tokens
    34 +  4 S   8 S    int64 sequence pointers, in bytes into .bin: exclusive prefix sum of length * itemsize
    34 + 12 S   8 E    int64 document boundaries: document k is sequences [d[k], d[k+1]), first 0, last S

Source: Megatron-LM ``megatron/core/datasets/indexed_dataset.py``. Megatron trusts the file; here every count,
pointer and size is checked when it is opened (one vectorised pass, about 0.1 s per 10 million sequences),
because a damaged index otherwise shows up hours later as garbage tokens. Per-sequence modes (multimodal
datasets) are refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fp8train.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = (6, 7)  # float64, float32: legal in the format, not token ids
_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """Storage type of token ids, as Megatron chooses it: uint16 below 65500 ids, otherwise int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True)
class Index:
    """The content of an ``.idx`` file, checked.

    Attributes:
        dtype: Type of the tokens in ``.bin``.
        document_offsets: int64 [D + 1], first token of every document and, last, the number of tokens.
    """

    dtype: np.dtype
    document_offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the ``.bin`` file."""
        return int(self.document_offsets[-1])


def read_index(path: Path) -> Index:
    """Map an ``.idx`` file into memory and check it.

    Raises:
        DataError: It is not an index, is truncated or too long, or contradicts itself.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    dtype, num_sequences, num_boundaries = _parse_header(path, header)
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size != expected:
        if num_sequences and size == expected + num_sequences:
            raise DataError(
                f"{path}: holds per-sequence modes (a multimodal dataset); only text datasets are supported"
            )
        kind = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path}: {kind}: {size} bytes, but its header ({num_sequences} sequences, {num_boundaries} "
            f"document boundaries) needs {expected}\nprepare the dataset again, or copy the file again"
        )
    lengths = _map(path, "<i4", HEADER.size, num_sequences)
    pointers = _map(path, "<i8", HEADER.size + 4 * num_sequences, num_sequences)
    boundaries = np.array(_map(path, "<i8", HEADER.size + 12 * num_sequences, num_boundaries))
    _check_boundaries(path, boundaries, num_sequences)
    offsets = np.zeros(num_sequences + 1, dtype=np.int64)
    _check_pointers(path, lengths, pointers, dtype.itemsize, offsets)
    one_each = num_boundaries == num_sequences + 1 and np.array_equal(boundaries, np.arange(num_boundaries))
    return Index(dtype, offsets if one_each else offsets[boundaries])


def write_index(stream: BinaryIO, dtype: np.dtype, lengths: np.ndarray, boundaries: np.ndarray) -> None:
    """Write the ``.idx`` file of a dataset with these sequences.

    Args:
        stream: Where to write.
        dtype: Type of the tokens in ``.bin``, one of ``TOKEN_DTYPES``.
        lengths: int32 [S], tokens per sequence.
        boundaries: int64 [D + 1], first sequence of every document and, last, S.
    """
    code = next(code for code, known in TOKEN_DTYPES.items() if known == dtype)
    stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(boundaries)))
    stream.write(lengths.astype("<i4", copy=False).tobytes())
    before = 0
    for begin, end in _chunks(len(lengths)):
        ends = before + np.cumsum(lengths[begin:end], dtype=np.int64)
        stream.write(((ends - lengths[begin:end]) * dtype.itemsize).astype("<i8", copy=False).tobytes())
        before = int(ends[-1])
    stream.write(boundaries.astype("<i8", copy=False).tobytes())


def _parse_header(path: Path, header: bytes) -> tuple[np.dtype, int, int]:
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path}: not an index of a Megatron dataset (it does not start with {MAGIC!r})\n"
            "make one with: fp8train data prepare"
        )
    if len(header) < HEADER.size:
        raise DataError(f"{path}: truncated: {len(header)} bytes, the header alone needs {HEADER.size}")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path}: index version {version}; only version {VERSION} is supported")
    if code in FLOAT_CODES:
        raise DataError(f"{path}: stores floating-point data (dtype code {code}), not token ids")
    if code not in TOKEN_DTYPES:
        raise DataError(f"{path}: unknown dtype code {code}; known: {', '.join(map(str, TOKEN_DTYPES))}")
    if num_boundaries < 1:
        raise DataError(f"{path}: damaged: no document boundaries")
    return TOKEN_DTYPES[code], num_sequences, num_boundaries


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _check_boundaries(path: Path, boundaries: np.ndarray, num_sequences: int) -> None:
    first, last = int(boundaries[0]), int(boundaries[-1])
    if first != 0 or last != num_sequences or np.any(boundaries[1:] < boundaries[:-1]):
        raise DataError(
            f"{path}: damaged: document boundaries must rise from 0 to {num_sequences} (the number of "
            f"sequences), found {first} to {last}"
            + ("" if (first, last) != (0, num_sequences) else ", not in order")
        )


def _check_pointers(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int, offsets: np.ndarray
) -> None:
    """Check lengths against pointers, in chunks; fill ``offsets`` [S + 1] with first tokens of sequences."""
    for begin, end in _chunks(len(lengths)):
        if int(lengths[begin:end].min()) < 0:
            where = begin + int(np.argmax(lengths[begin:end] < 0))
            raise DataError(f"{path}: damaged: sequence {where} has length {lengths[where]}")
        np.cumsum(lengths[begin:end], dtype=np.int64, out=offsets[begin + 1 : end + 1])
        offsets[begin + 1 : end + 1] += offsets[begin]
        wrong = pointers[begin:end] != offsets[begin:end] * itemsize
        if wrong.any():
            where = begin + int(np.argmax(wrong))
            raise DataError(
                f"{path}: damaged: sequence {where} points at byte {pointers[where]}, but the lengths "
                f"before it add up to byte {offsets[where] * itemsize}"
            )


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))
