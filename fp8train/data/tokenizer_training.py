"""Training a SentencePiece tokenizer that loses nothing.

Settings and why: identity normalisation, no dummy prefix and no whitespace clean-up keep every character;
byte fallback encodes characters outside the vocabulary; whitespace-only pieces make indentation one token;
digits are split so that numbers are spelt alike everywhere. A newline is never inside a piece: it is one byte
token, so texts can be encoded line by line. The number of threads is part of the model file (and of unigram's
float sums), so it is a constant: the model is a function of the text and the settings alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from fp8train.data.errors import DataError
from fp8train.data.tokenizer import SPACE_SYMBOL

UNK_ID, EOD_ID, PAD_ID = 0, 1, 2
UNK_PIECE, EOD_PIECE, PAD_PIECE = "<unk>", "<eod>", "<pad>"
MIN_VOCAB_SIZE = 3 + 256 + 1  # the three above, all bytes, and something to learn
_THREADS = 2
_MAX_CHARACTERS = 8192  # longer lines are cut: SentencePiece drops what passes its limit


def train_sentencepiece(
    texts: Iterable[str], *, vocab_size: int, model_type: Literal["bpe", "unigram"] = "bpe"
) -> bytes:
    """Train a SentencePiece tokenizer with byte fallback on these texts.

    Args:
        texts: Training text in any pieces; cut into lines here. All of it is held in memory by SentencePiece.
        vocab_size: Number of ids, the 256 bytes and three special ids included.
        model_type: ``bpe`` trains in seconds; ``unigram`` is 10-20 times slower to train and faster to
            encode.

    Returns:
        The content of a ``.model`` file. Equal texts and settings give equal bytes.

    Raises:
        DataError: The vocabulary is too small for the format or too large for the text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size {vocab_size} is too small: 256 bytes and 3 special ids leave nothing to learn "
            f"below {MIN_VOCAB_SIZE}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _MAX_CHARACTERS,
            unk_id=UNK_ID,
            eos_id=EOD_ID,
            pad_id=PAD_ID,
            bos_id=-1,
            unk_piece=UNK_PIECE,
            eos_piece=EOD_PIECE,
            pad_piece=PAD_PIECE,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # drop the C++ source line
        raise DataError(
            f"SentencePiece cannot learn {vocab_size} {model_type} tokens from this text: {reason}\n"
            "choose another vocab_size, or give more text"
        ) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if line and SPACE_SYMBOL not in line and "\0" not in line:
                for begin in range(0, len(line), _MAX_CHARACTERS):
                    yield line[begin : begin + _MAX_CHARACTERS]
