"""Text to a dataset: ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.json`` and the tokenizer beside them.

Documents are written in a seeded random order unless told otherwise, because splits are cut in file order, as
Megatron does: without shuffling, the validation set of a sorted folder is its last subfolder. The price is a
second pass over the tokens. The result depends on the input, the options and the seed only, not on the number
of workers or the machine.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fp8train.data.byte_progress import ByteProgress
from fp8train.data.cleaning import Report
from fp8train.data.encoding import Encoder
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.permutation import Permutation
from fp8train.data.sidecar import Sidecar, sidecar_path
from fp8train.data.sources import DEFAULT_PATTERNS, Unit, find_files, plan_units, read_unit, unit_bytes
from fp8train.data.tokenizer import Tokenizer
from fp8train.data.tokenizer_training import train_sentencepiece
from fp8train.files import replace_file

DEFAULT_VOCAB_SIZE = 8192
_COPY_TOKENS = 1 << 22


def prepare(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    *,
    tokenizer: str | Path | None = None,
    eod_token: str | None = None,
    vocab_size: int | None = None,
    model_type: Literal["bpe", "unigram"] | None = None,
    tokenizer_train_bytes: int = 100_000_000,
    patterns: Sequence[str] = DEFAULT_PATTERNS,
    text_key: str = "text",
    max_line_bytes: int = 1_000_000,
    shuffle: bool = True,
    seed: int = 1234,
    workers: int | None = None,
    overwrite: bool = False,
) -> Sidecar:
    """Make a dataset for pretraining from text files, and train its tokenizer where none is given.

    Args:
        inputs: Text files (one document each), ``.jsonl`` files (one document per line) and folders of them.
        prefix: Path of the result without suffix; its folder is created.
        tokenizer: Existing tokenizer (SentencePiece model, ``tokenizer.json``, or a folder with one);
            default: train one.
        eod_token: End-of-document token of a ``tokenizer.json`` with an unusual name for it.
        vocab_size: Of the tokenizer to train; default 8192.
        model_type: Of the tokenizer to train; default ``bpe``.
        tokenizer_train_bytes: Train on a seeded sample of lines of about this many bytes.
        patterns: Glob patterns of the files to take from folders.
        text_key: Key of the text in JSONL records.
        max_line_bytes: Documents with a longer line are skipped.
        shuffle: Write documents in random order (see the module's docstring).
        seed: Of the shuffle and of the tokenizer's sample.
        workers: Processes; default: the cores this process may use.
        overwrite: Replace an existing dataset.

    Returns:
        What was written to ``PREFIX.json``; its ``report`` counts the documents skipped and repaired.

    Raises:
        DataError: An option is wrong, an input is missing, nothing is left to write, or the disk is full.
    """
    if tokenizer is not None and (vocab_size is not None or model_type is not None):
        raise DataError(
            "vocab_size and model_type are for training a tokenizer; drop them, or drop the given tokenizer"
        )
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")
    if max_line_bytes < 1 or tokenizer_train_bytes < 1:
        raise DataError("max_line_bytes and tokenizer_train_bytes must be at least 1")
    check_target(Path(prefix), overwrite)
    units = plan_units(find_files(inputs, patterns))
    try:
        if tokenizer is None:
            texts = _sample(units, tokenizer_train_bytes, seed, text_key, max_line_bytes)
            content = train_sentencepiece(
                texts, vocab_size=vocab_size or DEFAULT_VOCAB_SIZE, model_type=model_type or "bpe"
            )
            beside = Path(f"{prefix}.model")
        else:
            content, beside = tokenizer_beside(load_tokenizer(tokenizer, eod_token=eod_token), prefix)
        idx_path(prefix).unlink(missing_ok=True)  # from here on the old dataset, if any, is gone
        replace_file(beside, content)
        encoder = Encoder(beside, eod_token, text_key, max_line_bytes)
        loaded = load_tokenizer(beside, eod_token=eod_token)
        workers = workers or len(os.sched_getaffinity(0))
        return _write(units, str(prefix), encoder, loaded, workers, seed if shuffle else None)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DataError(f"cannot write dataset {prefix}: {where}{error.strerror or error}") from error


def tokenizer_beside(tokenizer: Tokenizer, prefix: str | Path) -> tuple[bytes, Path]:
    """Content of a tokenizer's file, and where its copy beside a dataset lives."""
    suffix = "tokenizer.json" if tokenizer.path.suffix == ".json" else "model"
    return tokenizer.path.read_bytes(), Path(f"{prefix}.{suffix}")


def check_target(prefix: Path, overwrite: bool) -> None:
    """Make the folder of a new dataset, if it may be written there.

    Raises:
        DataError: the dataset exists and may not be overwritten, or the folder cannot be made.
    """
    if prefix.name in ("", ".", ".."):
        raise DataError(
            f"prefix {prefix}: give a path that ends in a name, for example data/{prefix.name or 'corpus'}"
        )
    existing = [path for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix)) if path.exists()]
    if existing and not overwrite:
        names = ", ".join(map(str, existing))
        raise DataError(
            f"dataset {prefix} exists ({names})\nchoose another prefix, or overwrite it with --overwrite"
        )
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{prefix.parent}: cannot create the folder: {error.strerror or error}") from error


def _write(
    units: Sequence[Unit], prefix: str, encoder: Encoder, tokenizer: Tokenizer, workers: int, seed: int | None
) -> Sidecar:
    """Encode everything, then sidecar, ``.bin`` and, last, ``.idx``."""
    report, source_bytes, exact_bytes = Report(), 0, True
    total = sum(map(unit_bytes, units))
    unshuffled = f"{prefix}.unshuffled.{os.getpid()}"
    first_prefix = prefix if seed is None else unshuffled
    try:
        with (
            IndexedDatasetWriter(first_prefix, vocab_size=tokenizer.vocab_size) as writer,
            ByteProgress("encoding", total) as progress,
        ):
            for unit, encoded in zip(units, encoder.encode_units(units, workers=workers), strict=True):
                writer.add_documents(encoded.tokens, encoded.lengths)
                report.merge(encoded.report)
                source_bytes += encoded.source_bytes
                exact_bytes &= encoded.exact_bytes
                progress.advance(unit_bytes(unit))
            if writer.num_documents == 0:
                raise DataError("\n".join(["no document is left to write:", *report.lines()][:5]))
            sidecar = Sidecar(
                tokenizer_file=tokenizer.path.name,
                tokenizer_sha256=tokenizer.sha256,
                eod_token=encoder.eod_token,
                eod_id=tokenizer.eod_id,
                vocab_size=tokenizer.vocab_size,
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                source_bytes=source_bytes,
                exact_bytes=exact_bytes,
                shuffle_seed=seed,
                report=report.counts,
            )
            replace_file(sidecar_path(prefix), (sidecar.model_dump_json(indent=2) + "\n").encode())
            writer.finish()
        if seed is not None:
            _shuffle(IndexedDataset(unshuffled), prefix, tokenizer.vocab_size, seed)
    finally:
        if seed is not None:
            bin_path(unshuffled).unlink(missing_ok=True)
            idx_path(unshuffled).unlink(missing_ok=True)
    return sidecar


def _shuffle(source: IndexedDataset, prefix: str, vocab_size: int, seed: int) -> None:
    order = Permutation(source.num_documents, (seed, 0))
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        documents: list[np.ndarray] = []
        waiting = 0
        for number in range(source.num_documents):
            documents.append(source.document(order[number]))
            waiting += len(documents[-1])
            if waiting >= _COPY_TOKENS or number == source.num_documents - 1:
                writer.add_documents(np.concatenate(documents), [len(document) for document in documents])
                documents, waiting = [], 0
        writer.finish()


def _sample(
    units: Sequence[Unit], limit: int, seed: int, text_key: str, max_line_bytes: int
) -> Iterator[str]:
    """Lines of about ``limit`` bytes, from random units that hold at most about four times as much."""
    rng = random.Random(seed)
    drawn, drawn_bytes = [], 0
    for number in rng.sample(range(len(units)), len(units)):
        drawn.append(number)
        drawn_bytes += unit_bytes(units[number])
        if drawn_bytes >= 4 * limit:
            break
    share = min(1.0, limit / max(drawn_bytes, 1))
    unreported = Report()  # encoding visits the same documents and counts them
    for number in sorted(drawn):
        for text in read_unit(units[number], unreported, text_key=text_key, max_line_bytes=max_line_bytes):
            if share == 1.0:
                yield text
            else:
                yield from (line for line in text.split("\n") if rng.random() < share)
