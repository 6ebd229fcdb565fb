"""A look at a dataset, decoded: the cheapest test that it holds what one thinks it does."""

from __future__ import annotations

from pathlib import Path

from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, bin_path
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.sidecar import check_same_tokenizer, read_sidecar, sidecar_tokenizer
from fp8train.data.tokenizer import Tokenizer


def inspect_dataset(
    prefix: str | Path,
    *,
    documents: int = 3,
    max_tokens: int = 60,
    tokenizer: str | Path | None = None,
    scan: bool = False,
) -> str:
    """Describe a dataset and decode the beginnings of its first documents.

    Args:
        prefix: Path without ``.bin``/``.idx``.
        documents: How many to show.
        max_tokens: Tokens shown of each.
        tokenizer: Tokenizer file; default: the one beside the dataset. Without either, ids are shown
            undecoded.
        scan: Read every token and check it against the vocabulary.

    Returns:
        Text of several lines.

    Raises:
        DataError: The dataset is damaged, the tokenizer is not its own, or (``scan``) a token is outside the
            vocabulary.
    """
    dataset = IndexedDataset(prefix)
    sidecar = read_sidecar(dataset)
    loaded: Tokenizer | None = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer, eod_token=sidecar.eod_token if sidecar else None)
        if sidecar is not None:
            check_same_tokenizer(dataset.prefix, sidecar, loaded)
    elif sidecar is not None:
        loaded = sidecar_tokenizer(prefix, sidecar)
    size = dataset.num_tokens * dataset.dtype.itemsize
    lines = [
        f"{bin_path(prefix)}: {dataset.num_documents} documents, {dataset.num_tokens} tokens of type "
        f"{dataset.dtype.name}, {size} bytes"
    ]
    if sidecar is not None:
        lines.append(
            f"text: {sidecar.source_bytes} bytes, {sidecar.source_bytes / max(sidecar.tokens, 1):.2f} per "
            "token"
        )
        if sidecar.mask is not None:
            lines.append(f"for fine-tuning: {sidecar.mask.targets} tokens are targets")
        lines += [f"{reason}: {count}" for reason, count in sidecar.report.items()]
    if loaded is None:
        lines.append("tokenizer: unknown; ids are shown as they are")
    else:
        lines.append(f"tokenizer: {loaded.path}, {loaded.vocab_size} ids, end of document {loaded.eod_id}")
    if scan:
        if loaded is None:
            raise DataError(f"dataset {prefix}: scanning needs the vocabulary; name the tokenizer")
        dataset.check_vocab(loaded.vocab_size)
        lines.append(f"all {dataset.num_tokens} tokens are in [0, {loaded.vocab_size})")
    for number in range(min(documents, dataset.num_documents)):
        tokens = dataset.document(number)
        shown = [int(token) for token in tokens[:max_tokens]]
        lines.append(
            f"--- document {number}: {len(tokens)} "
            f"tokens{', the first ' + str(max_tokens) if len(tokens) > max_tokens else ''}"
        )
        lines.append(" ".join(map(str, shown)) if loaded is None else repr_text(loaded, shown))
    return "\n".join(lines)


def repr_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decoded text in which control characters other than newline and tab are escaped, so that it cannot
    steer a terminal.
    """
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            raise DataError(
                f"token id {token} is outside the tokenizer's vocabulary [0, {tokenizer.vocab_size})"
            )
    text = tokenizer.decode(ids)
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
