"""A tokenizer from its file, whichever the format."""

from __future__ import annotations

from pathlib import Path

from fp8train.data.errors import DataError
from fp8train.data.hf_tokenizer import HuggingFaceTokenizer
from fp8train.data.sentencepiece_tokenizer import SentencePieceTokenizer
from fp8train.data.tokenizer import Tokenizer


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
        return HuggingFaceTokenizer(path, eod_token=eod_token)
    if eod_token is not None:
        raise DataError(f"{path}: eod_token is for tokenizer.json files; a SentencePiece model names its own")
    return SentencePieceTokenizer(path)
