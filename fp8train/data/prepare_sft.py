"""Conversations to a dataset for fine-tuning: ``.bin``, ``.idx``, ``.json`` and, beside them, ``.mask``.

One document is one conversation, whole: how conversations share sequences is decided when they are read
(:mod:`fp8train.data.packing`), so the files do not depend on a sequence length. ``PREFIX.mask`` holds a byte
per token. Sets of conversations are small next to pretraining text, so one process does it, in memory (five
bytes a token).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fp8train.data.cleaning import Report
from fp8train.data.conversations import encode_segments, segments_of
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, idx_path
from fp8train.data.json_lines import json_lines
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.permutation import Permutation
from fp8train.data.prepare import check_target, tokenizer_beside
from fp8train.data.sidecar import Sidecar, TargetMask, sidecar_path
from fp8train.data.tokenizer import Tokenizer
from fp8train.files import replace_file


def mask_path(prefix: str | Path) -> Path:
    """Path of the target mask, ``PREFIX.mask``."""
    return Path(f"{prefix}.mask")


def prepare_sft(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    *,
    tokenizer: str | Path,
    eod_token: str | None = None,
    shuffle: bool = True,
    seed: int = 1234,
    overwrite: bool = False,
) -> Sidecar:
    """Make a dataset for fine-tuning from conversations.

    Args:
        inputs: ``.jsonl`` files, see :mod:`fp8train.data.conversations`.
        prefix: path of the result without suffix; its folder is created.
        tokenizer: of the model that will be trained.
        eod_token: end-of-document token of a ``tokenizer.json`` with an unusual name for it.
        shuffle: write conversations in random order (splits are cut in file order).
        seed: of that order.
        overwrite: replace an existing dataset.

    Returns:
        What was written to ``PREFIX.json``.

    Raises:
        DataError: a line is malformed (named), nothing is left to write, or the disk is full.
    """
    check_target(Path(prefix), overwrite)
    loaded, report = load_tokenizer(tokenizer, eod_token=eod_token), Report()
    conversations, source_bytes, exact = _encode(inputs, loaded, report)
    if not conversations:
        raise DataError("\n".join(["no conversation is left to write:", *report.lines()][:5]))
    if shuffle:
        order = Permutation(len(conversations), (seed, 0))
        conversations = [conversations[order[i]] for i in range(len(conversations))]
    mask = np.concatenate([mask for _, mask in conversations])
    content, beside = tokenizer_beside(loaded, prefix)
    try:
        idx_path(prefix).unlink(missing_ok=True)  # from here on the old dataset, if any, is gone
        replace_file(beside, content)
        replace_file(mask_path(prefix), mask.tobytes())
        with IndexedDatasetWriter(prefix, vocab_size=loaded.vocab_size) as writer:
            for tokens, _ in conversations:
                writer.add_document(tokens)
            sidecar = Sidecar(
                tokenizer_file=beside.name,
                tokenizer_sha256=loaded.sha256,
                eod_token=eod_token,
                eod_id=loaded.eod_id,
                vocab_size=loaded.vocab_size,
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                source_bytes=source_bytes,
                exact_bytes=exact,
                shuffle_seed=seed if shuffle else None,
                report=report.counts,
                mask=TargetMask(targets=int(mask.sum()), sha256=hashlib.sha256(mask.tobytes()).hexdigest()),
            )
            replace_file(sidecar_path(prefix), (sidecar.model_dump_json(indent=2) + "\n").encode())
            writer.finish()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DataError(f"cannot write dataset {prefix}: {where}{error.strerror or error}") from error
    return sidecar


def _encode(
    inputs: Sequence[str | Path], tokenizer: Tokenizer, report: Report
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int, bool]:
    """(tokens and masks, bytes of text, whether the tokens' bytes add up to them)."""
    lengths = tokenizer.token_lengths()
    conversations, source_bytes, exact = [], 0, lengths is not None
    for file in map(Path, inputs):
        for place, record in json_lines(file):
            segments = segments_of(record, place, report)
            if segments is None:
                continue
            tokens, mask = encode_segments(segments, tokenizer)
            num_bytes = sum(len(segment.text.encode()) for segment in segments)
            exact = exact and lengths is not None and int(lengths[tokens].sum()) == num_bytes
            source_bytes += num_bytes
            conversations.append((tokens, mask))
    return conversations, source_bytes, exact


def read_mask(dataset: IndexedDataset, sidecar: Sidecar | None) -> np.ndarray:
    """Which tokens of a dataset are targets: uint8 [num_tokens] of 0 and 1.

    Raises:
        DataError: the dataset has no mask, or its file is missing or damaged.
    """
    path = mask_path(dataset.prefix)
    if sidecar is None or sidecar.mask is None:
        raise DataError(
            f"dataset {dataset.prefix} does not say which tokens are targets, which `kind`: sft needs\n"
            "make it with fp8train data prepare-sft, or write `kind`: pretrain"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; copy all files of the dataset again") from error
    if hashlib.sha256(data).hexdigest() != sidecar.mask.sha256:
        raise DataError(
            f"{path}: not the file that {sidecar_path(dataset.prefix).name} describes; copy it again"
        )
    mask = np.frombuffer(data, dtype=np.uint8)
    assert len(mask) == dataset.num_tokens, "the sidecar fits the dataset and the mask fits the sidecar"
    return mask
