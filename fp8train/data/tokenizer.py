"""Tokenizers behind one interface: SentencePiece models (ours and others') and Hugging Face
``tokenizer.json``.

Pretraining on source code needs a tokenizer that loses nothing: every text, tabs, blank lines and odd
characters included, must come back byte for byte, and the number of bytes behind any run of tokens must be
known exactly, because that turns a loss in nats per token into bits per byte. Both follow from one table, the
UTF-8 bytes of every token id (:attr:`Tokenizer.token_bytes`): decoding joins its rows, byte counts sum their
lengths.

SentencePiece writes a space as U+2581 and so cannot tell a literal U+2581 from a space; that one character is
encoded here as its three byte tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

from fp8train.data.errors import DataError

SPACE_SYMBOL = "\u2581"
_PROBE = f" a  b\n\n\t c\u00e9\u3000{SPACE_SYMBOL}\r\n\U0001f600 x\x7f "


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


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file, from :func:`fp8train.data.tokenizer_training.train_sentencepiece` or
    elsewhere.

    A model that round-trips (no dummy prefix, identity normalisation, byte fallback) is used line by line,
    three times faster for BPE than whole documents and the same ids (unigram: up to ties in its float sums),
    since no piece crosses a newline. Any other model, Llama-2's for instance, sees whole documents, as its
    makers intended; ``token_bytes`` is None then.

    Raises:
        DataError: The file is missing, is not a SentencePiece model, or has no end-of-sequence id.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = read_tokenizer_file(self.path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(data)
        except RuntimeError as error:
            raise DataError(f"{self.path}: not a SentencePiece model") from error
        self.vocab_size = self._model.vocab_size()
        self.eod_id = self._model.eos_id()
        if self.eod_id < 0:
            raise DataError(f"{self.path}: the model has no end-of-sequence id, which ends documents")
        self._pieces = _piece_bytes(self._model)
        self._literal_symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        self._by_line = not any(len(piece) > 1 and b"\n" in piece for piece in self._pieces)
        self.token_bytes = self._pieces
        if self._join(self._encode_exact(_PROBE)) != _PROBE.encode():
            self.token_bytes = None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end-of-document id."""
        if self.token_bytes is None:
            return self._model.encode(text, num_threads=1)
        return self._encode_exact(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids vanish, cut characters become U+FFFD."""
        ids = [int(token) for token in ids]
        if self.token_bytes is None:
            return self._model.decode(ids)
        return self._join(ids).decode("utf-8", errors="replace")

    def _join(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._pieces[token] for token in ids])

    def _encode_exact(self, text: str) -> list[int]:
        parts = text.split(SPACE_SYMBOL)
        ids = self._encode_plain(parts[0])
        for part in parts[1:]:
            ids += self._literal_symbol
            ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        lines = text.split("\n")
        if not self._by_line or len(lines) == 1:
            return self._model.encode(text, num_threads=1)
        lines = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
        return list(chain.from_iterable(self._model.encode(lines, num_threads=1)))


def load_tokenizer(path: str | Path, *, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer file: ``*.json`` is Hugging Face's format, anything else a SentencePiece model.

    Args:
        path: The file, or a folder that holds ``tokenizer.json`` or ``tokenizer.model``.
        eod_token: Token that ends documents; for Hugging Face files whose choice is not one of the usual
            names.

    Raises:
        DataError: The file is missing or damaged, its library is not installed, or it has no end-of-document
            token.
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: the folder holds neither {' nor '.join(names)}")
        path = found[0]
    if path.suffix == ".json":
        from fp8train.data.hf_tokenizer import HuggingFaceTokenizer  # needs the optional library

        return HuggingFaceTokenizer(path, eod_token=eod_token)
    if eod_token is not None:
        raise DataError(f"{path}: eod_token is for tokenizer.json files; a SentencePiece model names its own")
    return SentencePieceTokenizer(path)


def read_tokenizer_file(path: Path) -> bytes:
    """Read all bytes of a tokenizer file.

    Raises:
        DataError: It is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror or error}") from error


def _piece_bytes(model: sentencepiece.SentencePieceProcessor) -> list[bytes]:
    pieces = []
    for token in range(model.vocab_size()):
        piece = model.id_to_piece(token)
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            pieces.append(b"")
        elif model.is_byte(token):
            pieces.append(bytes([int(piece[3:5], 16)]))
        else:
            pieces.append(piece.replace(SPACE_SYMBOL, " ").encode())
    return pieces
