"""The ``data`` section: which tokens a run reads.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fp8train.config.limits import Context
from fp8train.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    contradiction,
)


class BlendEntry(Section):
    """One dataset of a blend."""

    prefix: str = Field(examples=["data/my_corpus"])
    """Path without ``.bin``/``.idx``."""
    weight: PositiveFloat = Field(examples=[1.0])
    """Relative share of samples."""


class DataConfig(Section):
    """Tokenised text: Megatron ``.bin``/``.idx`` pairs made by ``fp8train data prepare``."""

    prefix: str | None = Field(default=None, examples=["data/my_corpus"])
    """Dataset path without ``.bin``/``.idx``. Exactly one of ``prefix`` and ``blend``."""
    blend: tuple[BlendEntry, ...] | None = Field(default=None, strict=False)
    """Several datasets with weights."""
    valid_prefix: str | None = None
    """Separate validation dataset; then the validation share of ``split`` must be 0."""
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        default=(0.98, 0.02, 0.0), strict=False
    )
    """Shares of documents for train, validation and test; normalised to 1."""
    seq_length: Context = Field(examples=[2048])
    """Tokens a sample predicts; a sample holds one token more."""
    tokenizer: str | None = None
    """Tokenizer file; default: the one recorded beside the dataset. Its hash must match the dataset's."""
    shuffle_seed: NonNegativeInt | None = None
    """Seed of the sample order; default ``run.seed``."""
    mask_end_of_document: bool = False
    """Exclude the prediction made *from* an end-of-document token from the loss; not with ``kind: sft``,
    which has a mask of its own."""
    kind: Literal["pretrain", "sft"] = "pretrain"
    """``sft``: conversations made by ``fp8train data prepare-sft``; the loss is that of their answers."""
    packing: Literal["best_fit", "none"] | None = None
    """How conversations share sequences (``kind: sft``): ``best_fit`` (default) fills them; ``none``: one
    each, padded, so that none is seen by another."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.prefix is not None and self.blend is not None:
            raise contradiction(
                "set exactly one of data.prefix and data.blend; to use the blend write "
                "data.prefix=null, to use the one dataset data.blend=null",
                "prefix",
                "blend",
            )
        if self.prefix is None and self.blend is None:
            raise contradiction(
                "set exactly one of data.prefix and data.blend; for example data.prefix=data/my_corpus",
                "prefix",
                "blend",
            )
        if self.blend is not None and len(self.blend) == 0:
            raise contradiction("blend is empty; list at least one entry {prefix: ..., weight: ...}", "blend")
        if self.split[0] <= 0:
            raise contradiction("the training share (first number) must be larger than 0", "split")
        if self.valid_prefix is not None and self.split[1] > 0:
            raise contradiction(
                "valid_prefix is set and split keeps a validation share too; "
                "write split: [1, 0, 0] or remove valid_prefix",
                "valid_prefix",
                "split",
            )
        return self
