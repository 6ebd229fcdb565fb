"""Token files of Megatron: a ``.bin`` of raw token ids and an ``.idx`` that cuts it into documents.

The reader maps both files, so opening costs the index only and several processes share the page cache. The
writer appends to temporary names and renames at the end, ``.idx`` last: a dataset that was interrupted has no
index and cannot be opened by mistake.

The unit is the *document*; Megatron's "sequence" (a document may hold several) is visible only in the index.
Our writer stores one sequence per document, as Megatron's ``preprocess_data`` does by default.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np

from fp8train.data.errors import DataError
from fp8train.data.index_file import Index, read_index, token_dtype, write_index
from fp8train.files import fsync_dir

_SCAN_TOKENS = 1 << 22
_HASH_BLOCK = 1 << 14
_HASH_BLOCKS = 64
_MAX_LENGTH = 2**31 - 1  # sequence lengths are int32


def bin_path(prefix: str | Path) -> Path:
    """Path of the file with the tokens, ``PREFIX.bin``."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index file, ``PREFIX.idx``."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The documents of a Megatron dataset, read-only and memory-mapped.

    Args:
        prefix: Path without ``.bin``/``.idx``.

    Attributes:
        prefix: The path given.
        dtype: numpy type of the stored tokens.
        num_documents: D.
        num_tokens: Tokens of all documents.
        document_offsets: int64 [D + 1]; document k holds tokens ``[document_offsets[k], document_offsets[k +
            1])``.

    Raises:
        DataError: A file is missing, unreadable or damaged, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._index = _open_index(self.prefix)
        self.dtype = self._index.dtype
        self.document_offsets = self._index.document_offsets
        self.num_documents = len(self.document_offsets) - 1
        self.num_tokens = self._index.num_tokens
        self._tokens = _map_tokens(self.prefix, self._index)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """View of tokens ``[start, stop)`` of the whole file, in the stored type."""
        return self._tokens[start:stop]

    def document(self, number: int) -> np.ndarray:
        """View of the tokens of one document, in the stored type."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.num_documents}")
        return self._tokens[self.document_offsets[number] : self.document_offsets[number + 1]]

    def place(self, position: int) -> tuple[int, int]:
        """Document that holds token ``position`` of the file, and the token's offset in it."""
        assert 0 <= position < self.num_tokens
        document = int(np.searchsorted(self.document_offsets, position, side="right")) - 1
        return document, position - int(self.document_offsets[document])

    def check_vocab(self, vocab_size: int, start: int = 0, stop: int | None = None) -> None:
        """Check that tokens ``[start, stop)`` (default: all) are in ``[0, vocab_size)``.

        Reads what it checks, about 2 GB/s from the page cache.

        Raises:
            DataError: Names the first offending token, its document and its offset there.
        """
        end = self.num_tokens if stop is None else stop
        for begin in range(start, end, _SCAN_TOKENS):
            chunk = self._tokens[begin : min(begin + _SCAN_TOKENS, end)]
            if int(chunk.min()) < 0 or int(chunk.max()) >= vocab_size:
                position = begin + int(np.argmax((chunk < 0) | (chunk >= vocab_size)))
                raise out_of_vocab(
                    self.prefix, *self.place(position), int(self._tokens[position]), vocab_size
                )

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the index, the size of ``.bin`` and a sample of its bytes.

        The sample is 64 evenly spaced blocks of 16 KiB, ends included (everything, up to 1 MiB): enough to
        notice that a file was rebuilt, too little to notice a flipped bit.
        """
        digest = hashlib.sha256()
        with open(idx_path(self.prefix), "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        size = self.num_tokens * self.dtype.itemsize
        digest.update(size.to_bytes(8, "little"))
        data = self._tokens.view(np.uint8)
        if size <= _HASH_BLOCK * _HASH_BLOCKS:
            digest.update(data.tobytes())
        else:
            for block_start in np.linspace(0, size - _HASH_BLOCK, _HASH_BLOCKS).astype(np.int64):
                digest.update(data[block_start : block_start + _HASH_BLOCK].tobytes())
        return digest.hexdigest()


def out_of_vocab(prefix: str, document: int, offset: int, token: int, vocab_size: int) -> DataError:
    """The error for a token id that the model has no embedding for."""
    return DataError(
        f"{bin_path(prefix)}: token id {token} at document {document}, offset {offset} is outside the "
        f"vocabulary [0, {vocab_size})\n"
        "the dataset was built with another tokenizer, `vocab_size` is too small, or the file is damaged"
    )


class IndexedDatasetWriter:
    """Writes a dataset, one document per call; nothing is visible under the final names before
    :meth:`finish`.

    Use as a context manager: leaving it without ``finish()`` removes the temporary files. Memory: 4 bytes per
    document.

    Args:
        prefix: Path without ``.bin``/``.idx``; the folder must exist.
        vocab_size: Decides the stored type; every token must be in ``[0, vocab_size)``.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens = 0
        self._lengths = array("i")
        self._tmp_bin = Path(f"{prefix}.bin.{os.getpid()}.tmp")
        self._tmp_idx = Path(f"{prefix}.idx.{os.getpid()}.tmp")
        self._stream = open(self._tmp_bin, "wb")  # noqa: SIM115 - closed by finish() or __exit__()

    @property
    def num_documents(self) -> int:
        """Number of documents written so far."""
        return len(self._lengths)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document, an integer array [n] of token ids."""
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: np.ndarray, lengths: list[int]) -> None:
        """Append documents: their tokens end to end, integer array [sum(lengths)], and their lengths."""
        assert sum(lengths) == len(tokens)
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"{bin_path(self.prefix)}: the tokenizer produced id {low if low < 0 else high}, "
                    f"outside its vocabulary [0, {self.vocab_size}); the tokenizer file is damaged"
                )
        if lengths and max(lengths) > _MAX_LENGTH:
            raise DataError(
                f"{bin_path(self.prefix)}: a document has {max(lengths)} tokens; the format holds 2^31 - 1"
            )
        self._stream.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.extend(lengths)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Sync both files and rename them, ``.idx`` last. An old dataset of the same name loses its ``.idx``
        first.
        """
        os.fsync(self._stream.fileno())
        self._stream.close()
        with open(self._tmp_idx, "wb") as stream:
            lengths = np.frombuffer(self._lengths, dtype=np.intc) if self._lengths else np.empty(0, np.intc)
            write_index(stream, self.dtype, lengths, np.arange(len(lengths) + 1, dtype=np.int64))
            stream.flush()
            os.fsync(stream.fileno())
        idx_path(self.prefix).unlink(missing_ok=True)
        self._tmp_bin.replace(bin_path(self.prefix))
        self._tmp_idx.replace(idx_path(self.prefix))
        fsync_dir(bin_path(self.prefix).parent)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._tmp_bin.unlink(missing_ok=True)
        self._tmp_idx.unlink(missing_ok=True)


def _open_index(prefix: str) -> Index:
    paths = (bin_path(prefix), idx_path(prefix))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        hint = "\nset the prefix of a dataset that is there, or make it with fp8train data prepare"
        if prefix.endswith((".bin", ".idx")) and idx_path(prefix[:-4]).is_file():
            hint = f"\ngive the prefix without its suffix: {prefix[:-4]}"
        raise DataError(
            f"dataset {prefix}: missing: {', '.join(path.name for path in missing)}; "
            f"expected the two files\n  {paths[0]}\n  {paths[1]}{hint}"
        )
    try:
        return read_index(paths[1])
    except OSError as error:
        raise DataError(f"{paths[1]}: cannot be read: {error.strerror or error}") from error


def _map_tokens(prefix: str, index: Index) -> np.ndarray:
    path = bin_path(prefix)
    try:
        size = os.path.getsize(path)
        needed = index.num_tokens * index.dtype.itemsize
        if size != needed:
            raise DataError(
                f"{path}: {size} bytes, but {idx_path(prefix).name} describes {index.num_tokens} tokens of "
                f"{index.dtype.itemsize} bytes = {needed}: the file is "
                f"{'shorter' if size < needed else 'longer'} than its index says\n"
                "copy it again, or prepare the dataset again"
            )
        if index.num_tokens == 0:
            return np.empty(0, dtype=index.dtype)
        # A plain ndarray over the map: slicing np.memmap itself costs several microseconds a time.
        return np.memmap(path, dtype=index.dtype, mode="r", shape=(index.num_tokens,)).view(np.ndarray)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
