"""Commands that make and show datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8train.cli.app import data_app, write
from fp8train.config.errors import UserError


@data_app.command()
def prepare(
    output: Annotated[str, typer.Option("--output", help="Path of the dataset without .bin/.idx.")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="Text files, .jsonl files, folders", show_default=False)
    ] = None,
    stdlib: Annotated[
        bool, typer.Option("--stdlib", help="Add the source of Python's standard library.")
    ] = False,
    glob: Annotated[
        list[str] | None,
        typer.Option("--glob", help="Files to take from folders; default *.txt and *.jsonl."),
    ] = None,
    json_key: Annotated[str, typer.Option("--json-key", help="Key of the text in .jsonl records.")] = "text",
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Existing tokenizer file or folder.")
    ] = None,
    train_tokenizer: Annotated[
        Literal["unigram", "bpe"] | None,
        typer.Option("--train-tokenizer", help="Train a tokenizer on the text; default bpe."),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", min=2, help="Vocabulary of the trained tokenizer; default 8192."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; default: usable cores.")
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="Write documents in a seeded random order.")] = True,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the shuffle and the tokenizer's sample.")
    ] = 1234,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
) -> None:
    """Turn text into a dataset: OUTPUT.bin, OUTPUT.idx and the tokenizer beside them."""
    from fp8train.data.prepare import prepare as prepare_dataset
    from fp8train.data.sources import DEFAULT_PATTERNS, stdlib_corpus

    given: list[str | Path] = [*(inputs or ()), *(stdlib_corpus() if stdlib else ())]
    if not given:
        raise UserError("name text files or folders, or give --stdlib")
    sidecar = prepare_dataset(
        given,
        output,
        tokenizer=tokenizer,
        model_type=train_tokenizer,
        vocab_size=vocab_size,
        patterns=tuple(glob) if glob else DEFAULT_PATTERNS,
        text_key=json_key,
        workers=workers,
        shuffle=shuffle,
        seed=seed,
        overwrite=overwrite,
    )
    counts = f"{sidecar.documents} documents, {sidecar.tokens} tokens, {sidecar.source_bytes} bytes of text"
    report = "".join(f"  {reason}: {count}\n" for reason, count in sidecar.report.items())
    write(f"{output}: {counts}\n{report}")


@data_app.command(name="prepare-sft")
def prepare_conversations(
    inputs: Annotated[
        list[Path], typer.Argument(help=".jsonl of {prompt, response} or {messages: [{role, content}, ..]}")
    ],
    output: Annotated[str, typer.Option("--output", help="Path of the dataset without .bin/.idx.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="The model's tokenizer file or folder.")],
    shuffle: Annotated[bool, typer.Option(help="Write conversations in a seeded random order.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the shuffle.")] = 1234,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
) -> None:
    """Turn conversations into a dataset of which the answers are learnt (data.kind: sft)."""
    from fp8train.data.prepare_sft import prepare_sft

    sidecar = prepare_sft(
        inputs, output, tokenizer=tokenizer, shuffle=shuffle, seed=seed, overwrite=overwrite
    )
    assert sidecar.mask is not None
    counts = f"{sidecar.documents} conversations, {sidecar.tokens} tokens, {sidecar.mask.targets} targets"
    report = "".join(f"  {reason}: {count}\n" for reason, count in sidecar.report.items())
    write(f"{output}: {counts}\n{report}")


@data_app.command()
def inspect(
    prefix: Annotated[str, typer.Argument(help="Path of the dataset without .bin/.idx")],
    documents: Annotated[int, typer.Option("--documents", min=0, help="How many documents to show.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to show of each.")] = 60,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Tokenizer file; default: the one beside the dataset.")
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Check every token against the vocabulary.")] = False,
) -> None:
    """Describe a dataset and decode its first documents."""
    from fp8train.data.inspection import inspect_dataset

    write(
        inspect_dataset(prefix, documents=documents, max_tokens=max_tokens, tokenizer=tokenizer, scan=scan)
        + "\n"
    )
