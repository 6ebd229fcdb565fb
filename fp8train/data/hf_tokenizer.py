"""Hugging Face ``tokenizer.json`` files, through the optional ``tokenizers`` library (extra ``hf``).

The file decides everything (normaliser, pre-tokenizer, merges); here only the special tokens are settled:
text that looks like one is text, none is added, and one of them ends documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fp8train.config.limits import MAX_VOCAB
from fp8train.data.errors import DataError
from fp8train.data.tokenizer import SPACE_SYMBOL, Tokenizer, read_tokenizer_file

EOD_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "</s>", "<eos>", "<|eot_id|>")
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer, read from its ``tokenizer.json`` file.

    Args:
        path: The file.
        eod_token: Token that ends documents; default: the first of ``EOD_CANDIDATES`` that the vocabulary
            has.

    Raises:
        DataError: The library is not installed, the file is damaged, or no end-of-document token is found.
    """

    def __init__(self, path: str | Path, *, eod_token: str | None = None) -> None:
        self.path = Path(path)
        data = read_tokenizer_file(self.path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._model = _load(self.path, data)
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB:
            raise DataError(f"{self.path}: has the id {self.vocab_size - 1}, and no vocabulary is so large")
        self.eod_id = self._find_eod(eod_token)
        self.token_bytes = _token_bytes(json.loads(data), self._model.get_vocab(), self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without an end-of-document id."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special ids vanish, cut characters become U+FFFD."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def _find_eod(self, eod_token: str | None) -> int:
        for candidate in EOD_CANDIDATES if eod_token is None else (eod_token,):
            token = self._model.token_to_id(candidate)
            if token is not None:
                return token
        tried = eod_token or ", ".join(EOD_CANDIDATES)
        raise DataError(f"{self.path}: no end-of-document token (looked for {tried}); name it with eod_token")


def _load(path: Path, data: bytes) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"{path}: reading tokenizer.json needs the tokenizers library: pip install 'fp8train[hf]'"
        ) from error
    try:
        model = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise DataError(f"{path}: not a tokenizer.json: {str(error).splitlines()[0]}") from error
    model.encode_special_tokens = True
    model.no_padding()
    model.no_truncation()
    return model


def _token_bytes(content: dict[str, Any], vocab: dict[str, int], vocab_size: int) -> list[bytes] | None:
    """Bytes per id where the decoder is byte-level or byte-fallback; None for every other kind."""
    decoder = content.get("decoder") or {}
    kinds = [step.get("type") for step in decoder.get("decoders", [decoder])]
    if "ByteLevel" in kinds:
        alphabet = _byte_level_alphabet()
    elif "ByteFallback" in kinds:
        alphabet = None
    else:
        return None
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    table = [b""] * vocab_size
    for piece, number in vocab.items():
        if number in added:
            table[number] = b"" if added[number]["special"] else piece.encode()
        elif alphabet is not None:
            if any(character not in alphabet for character in piece):
                return None
            table[number] = bytes([alphabet[character] for character in piece])
        elif _BYTE_PIECE.fullmatch(piece):
            table[number] = bytes([int(piece[3:5], 16)])
        else:
            table[number] = piece.replace(SPACE_SYMBOL, " ").encode()
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's map from printable characters to bytes: printable Latin-1 stands for itself, the rest moves to
    U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
