"""``PREFIX.json``: what a dataset was made with, so that training can check that it fits.

Megatron's files say nothing about the tokenizer. The sidecar records its SHA-256, its special ids and a copy
of the file beside the dataset; a foreign dataset without a sidecar works too, but then the tokenizer has to
be named and cannot be checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fp8train.config.limits import MAX_VOCAB
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.tokenizer import Tokenizer

Count = Annotated[int, Field(ge=0, lt=2**63)]


class TargetMask(BaseModel):
    """What ``PREFIX.mask`` holds: one byte per token, 1 where the token is a target of fine-tuning."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    targets: Count
    """Tokens that are targets."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file."""


class Sidecar(BaseModel):
    """The content of ``PREFIX.json``: what a dataset was made with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    format: Literal["fp8train dataset"] = "fp8train dataset"
    """Says what the file is."""
    version: Literal[1] = 1
    """Of this layout."""
    tokenizer_file: Annotated[str, Field(pattern=r"^[^/\\\x00]*[^/\\.\x00][^/\\\x00]*$", max_length=255)]
    """Name of the tokenizer file, in the dataset's folder."""
    tokenizer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of that file."""
    eod_token: str | None = None
    """Name of the end-of-document token where the tokenizer file does not settle it."""
    eod_id: Count
    """Id that ends every document."""
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCAB)]
    """Every token is below this."""
    documents: Count
    """Documents written."""
    tokens: Count
    """Tokens written, end-of-document ids included."""
    source_bytes: Count
    """UTF-8 bytes of the text behind the tokens, after repairs."""
    exact_bytes: bool
    """Whether the lengths of the tokens' bytes add up to ``source_bytes``, document by document: then bits
    per byte can be computed for any range of tokens."""
    shuffle_seed: int | None
    """Documents were written in an order drawn from this seed; null: in source order."""
    report: dict[str, int]
    """Input documents that were skipped or repaired, by reason."""
    mask: TargetMask | None = None
    """Which tokens are targets, of a dataset for fine-tuning; null: all, a dataset for pretraining."""

    @model_validator(mode="after")
    def _eod_is_a_token(self) -> Sidecar:
        if self.eod_id >= self.vocab_size:
            raise ValueError(f"eod_id {self.eod_id} is outside the vocabulary [0, {self.vocab_size})")
        return self


def sidecar_path(prefix: str | Path) -> Path:
    """Path of the sidecar, ``PREFIX.json``."""
    return Path(f"{prefix}.json")


def read_sidecar(dataset: IndexedDataset) -> Sidecar | None:
    """The sidecar of an open dataset; None if there is none.

    Raises:
        DataError: It is damaged or describes another dataset.
    """
    path = sidecar_path(dataset.prefix)
    try:
        sidecar = Sidecar.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: not the description of a dataset: {where + ': ' if where else ''}{first['msg']}\n"
            "prepare the dataset again, or delete this file and set `tokenizer`"
        ) from error
    if (sidecar.documents, sidecar.tokens) != (dataset.num_documents, dataset.num_tokens):
        raise DataError(
            f"{path}: describes {sidecar.documents} documents and {sidecar.tokens} tokens, but "
            f"{dataset.prefix}.idx has "
            f"{dataset.num_documents} and {dataset.num_tokens}: the files do not belong together\n"
            "copy all files of the dataset again, or prepare it again"
        )
    return sidecar


def sidecar_tokenizer(prefix: str | Path, sidecar: Sidecar) -> Tokenizer:
    """The tokenizer that was copied beside the dataset.

    Raises:
        DataError: The file is missing or is not the one the dataset was built with.
    """
    tokenizer = load_tokenizer(Path(prefix).parent / sidecar.tokenizer_file, eod_token=sidecar.eod_token)
    check_same_tokenizer(str(prefix), sidecar, tokenizer)
    return tokenizer


def check_same_tokenizer(prefix: str, sidecar: Sidecar, tokenizer: Tokenizer) -> None:
    """Check that a tokenizer is the one a dataset was built with.

    Raises:
        DataError: Names both hashes.
    """
    if tokenizer.sha256 != sidecar.tokenizer_sha256:
        raise DataError(
            f"tokenizer {tokenizer.path} is not the one that dataset {prefix} was built with\n"
            f"  this file:         sha256 {tokenizer.sha256}\n"
            f"  recorded in {sidecar_path(prefix).name}: sha256 {sidecar.tokenizer_sha256}\n"
            f"use the tokenizer beside the dataset ({sidecar.tokenizer_file}), or prepare the dataset again"
        )
