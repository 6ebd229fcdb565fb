"""Any UTF-8 text as requests to score: perplexity and bits per byte without a prepared dataset.

A ``.jsonl`` file holds one document per line, under a key; any other file is one document, byte for byte.
Every token of every document is scored exactly once. Documents apart: each after the end-of-document id,
which is never scored. One stream: documents end to end, each closed by that id, which is scored as in
training (a token without bytes).

**Windows.** With a context of C tokens and a stride of s, the first window predicts the first C tokens; each
further one ends s tokens later (the last: at the end), reads the C tokens before its end and scores only
those that are new. So from the second window on every scored token has at least ``C - s`` tokens before it,
at a cost of ``C / s`` times the forward. Stride C, the default, reads every token once; a last window that is
shorter is filled up with earlier tokens as context. These are the windows of lm-eval's
``get_rolling_token_windows`` with ``context_len = C - s + 1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp8train.data.json_lines import json_lines
from fp8train.data.tokenizer import Tokenizer
from fp8train.evaluation.scoring import Request
from fp8train.inference.errors import InferenceError


@dataclass(frozen=True)
class Corpus:
    """Texts to evaluate, as tokens.

    Attributes:
        documents: token ids of each, without end-of-document ids.
        num_bytes: UTF-8 bytes of all.
    """

    documents: list[list[int]]
    num_bytes: int


def read_corpus(files: Sequence[Path], tokenizer: Tokenizer, *, json_key: str = "text") -> Corpus:
    """Read and tokenise the texts of files.

    Args:
        files: texts, or ``.jsonl`` files of documents.
        tokenizer: the model's.
        json_key: key of the text in ``.jsonl`` records.

    Raises:
        UserError: a file is missing, is not UTF-8, a line is malformed, or there is no text at all.
    """
    documents, num_bytes = [], 0
    for file in files:
        for text in _texts(file, json_key):
            num_bytes += len(text.encode())
            documents.append(tokenizer.encode(text))
    documents = [document for document in documents if document]
    if not documents:
        raise InferenceError(f"{', '.join(map(str, files))}: no text to evaluate")
    return Corpus(documents, num_bytes)


def _texts(file: Path, json_key: str) -> Iterator[str]:
    if file.suffix != ".jsonl":
        yield _read(file)
        return
    for place, record in json_lines(file):
        text = record.get(json_key)
        if not isinstance(text, str):
            raise InferenceError(f"{place}: no text under the key {json_key!r}")
        yield text


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InferenceError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InferenceError(f"{file}: not UTF-8 at byte {error.start}") from None


def windows(tokens: Sequence[int], *, before: int, context_length: int, stride: int) -> Iterator[Request]:
    """Cut a document into requests; see the module's description.

    Args:
        tokens: to score, each exactly once.
        before: token id that the first one follows.
        context_length: C, tokens that the model reads at once.
        stride: s, 1 to C.
    """
    assert 1 <= stride <= context_length
    sequence = [before, *tokens]
    done, end = 0, min(context_length, len(tokens))
    while done < len(tokens):
        first_read = max(0, end - context_length)
        yield Request(sequence[first_read : done + 1], sequence[done + 1 : end + 1])
        done, end = end, min(end + stride, len(tokens))


def corpus_requests(
    corpus: Corpus, *, eod_id: int, context_length: int, stride: int, one_stream: bool
) -> list[Request]:
    """Windows over every document, or over all of them as one stream with end-of-document ids between."""
    texts = corpus.documents
    if one_stream:
        texts = [[token for document in texts for token in (*document, eod_id)]]
    cut = partial(windows, before=eod_id, context_length=context_length, stride=stride)
    return [request for tokens in texts for request in cut(tokens)]
