"""What a tokenizer is, whatever its file format.

Pretraining on source code needs a tokenizer that loses nothing: every text, tabs, blank lines and odd
characters included, must come back byte for byte, and the number of bytes behind any run of tokens must be
known exactly, because that turns a loss in nats per token into bits per byte. Both follow from one table, the
UTF-8 bytes of every token id (:attr:`Tokenizer.token_bytes`): decoding joins its rows, byte counts sum their
lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fp8train.data.errors import DataError

SPACE_SYMBOL = "\u2581"
"""How SentencePiece, and files made from its models, write a space."""


class Tokenizer(ABC):
    """Turns text into token ids and back. Subclasses are the file formats.

    Attributes:
        path: The file it was loaded from.
        sha256: Hex digest of that file: the tokenizer's identity.
        vocab_size: Ids are ``[0, vocab_size)``.
        eod_id: Id that ends every document; no text encodes to it.
        token_bytes: UTF-8 bytes that each id stands for, ``[vocab_size]`` (special ids: none), or None where
            an id's bytes depend on its neighbours.
    """

    path: Path
    sha256: str
    vocab_size: int
    eod_id: int
    token_bytes: list[bytes] | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end-of-document id."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids vanish, cut characters become U+FFFD."""

    def token_lengths(self) -> np.ndarray | None:
        """UTF-8 bytes per id, int64 ``[vocab_size]``; None without ``token_bytes``.

        ``token_lengths()[tokens].sum()`` is the number of source bytes behind ``tokens``.
        """
        if self.token_bytes is None:
            return None
        return np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)


def read_tokenizer_file(path: Path) -> bytes:
    """Read all bytes of a tokenizer file.

    Raises:
        DataError: It is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror or error}") from error
