"""SentencePiece models, ours and others'.

SentencePiece writes a space as U+2581 and so cannot tell a literal U+2581 from a space; that one character is
encoded here as its three byte tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import sentencepiece

from fp8train.data.errors import DataError
from fp8train.data.tokenizer import SPACE_SYMBOL, Tokenizer, read_tokenizer_file

_PROBE = f" a  b\n\n\t c\u00e9\u3000{SPACE_SYMBOL}\r\n\U0001f600 x\x7f "


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
            self._pieces = _piece_bytes(self._model)
        except (RuntimeError, ValueError) as error:  # of pieces that are no text: UnicodeDecodeError
            raise DataError(
                f"{self.path}: not a SentencePiece model, or a damaged one; get the file again"
            ) from error
        self.vocab_size = self._model.vocab_size()
        self.eod_id = self._model.eos_id()
        if self.eod_id < 0:
            raise DataError(f"{self.path}: the model has no end-of-sequence id, which ends documents")
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
