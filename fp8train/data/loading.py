"""From the ``data`` section of a config to batches: the one call that training makes.

Everything that can be wrong with the data is found here, before the first step: missing or damaged files, a
tokenizer that is not the dataset's, a vocabulary larger than the model's, splits without a batch. Only token
ids themselves are checked batch by batch, since reading all of a large dataset takes hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fp8train.config.data_schema import DataConfig
from fp8train.data.batches import GlobalBatches
from fp8train.data.blend import Blend
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.packing import PackedSamples
from fp8train.data.prepare_sft import read_mask
from fp8train.data.samples import SPLITS, SampleDataset, Samples, split_documents
from fp8train.data.sidecar import Sidecar, check_same_tokenizer, read_sidecar, sidecar_path, sidecar_tokenizer
from fp8train.data.tokenizer import Tokenizer

SplitName = Literal["train", "valid", "test"]
_PADDED_TO = 1024
"""Vocabularies are padded to multiples of 64 to 1024, so that they divide over ranks and fit tiles."""


@dataclass(frozen=True)
class Data:
    """What a run reads: batches of each split, and the tokenizer behind them.

    Attributes:
        train: Training batches, endless.
        valid: Validation batches in a fixed order; None without a validation split. Use steps
            ``0 .. batches_per_epoch - 1``.
        test: Likewise.
        tokenizer: None where no dataset names one and ``data.tokenizer`` is not set.
        vocab_size: Tokens are below this: the model's vocabulary as given, else the tokenizer's.
        eod_id: End-of-document id; None without a tokenizer.
        token_lengths: UTF-8 bytes per id, int64 ``[tokenizer.vocab_size]``; None where they are not exact.
            With it, bits per byte = (summed loss in nats over targets) / ln 2 /
            ``token_lengths[targets].sum()``.
        epochs: Passes over the training split that ``total_steps`` make.
    """

    train: GlobalBatches
    valid: GlobalBatches | None
    test: GlobalBatches | None
    tokenizer: Tokenizer | None
    vocab_size: int
    eod_id: int | None
    token_lengths: np.ndarray | None
    epochs: float

    def summary(self) -> list[str]:
        """Printable lines that say what each split holds."""
        lines = []
        for batches in (self.train, self.valid, self.test):
            if batches is not None:
                lines.append(f"{batches.samples.description}, {batches.samples.samples_per_epoch} samples")
        lines[0] += f", {self.epochs:.3g} epochs"
        return lines

    def warnings(self) -> list[str]:
        """Printable lines: what a run can do with, but was hardly meant."""
        if self.tokenizer is None:
            return []
        known = self.tokenizer.vocab_size
        if self.vocab_size <= -(-known // _PADDED_TO) * _PADDED_TO:
            return []
        return [
            f"`vocab_size` ({self.vocab_size}) is far above the {known} tokens of {self.tokenizer.path}: "
            f"{self.vocab_size - known} rows of embedding and head are computed and never used; write "
            f"`vocab_size`=null to take the tokenizer's, or `vocab_size`={known}"
        ]


def open_data(
    config: DataConfig,
    *,
    vocab_size: int | None,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    seed: int,
    total_steps: int,
    ramp: Sequence[tuple[int, int]] = (),
) -> Data:
    """Open everything ``config`` names, check it and cut it into batches.

    Args:
        config: The ``data`` section.
        vocab_size: The model's (unpadded) vocabulary; None takes the tokenizer's.
        global_batch_size: Samples per step over all ranks.
        micro_batch_size: Samples per forward pass.
        dp_rank: This process among the data-parallel ranks.
        dp_size: Number of data-parallel ranks.
        seed: Of the sample order, unless ``config.shuffle_seed`` is set.
        total_steps: Length of the run, for :attr:`Data.epochs`.
        ramp: (steps, samples per step) of smaller global batches at the start of training.

    Raises:
        DataError: The data is missing, damaged, too small, or does not fit the tokenizer or the model.
    """
    opened = _open(config, prefixes_of(config, "train"), config.valid_prefix, vocab_size, seed)
    train, valid, test = (
        opened.batches(
            split,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            ramp=ramp if split == "train" else (),
        )
        for split in SPLITS
    )
    assert train is not None
    return Data(
        train=train,
        valid=valid,
        test=test,
        tokenizer=opened.tokenizer,
        vocab_size=opened.vocab_size,
        eod_id=opened.eod_id,
        token_lengths=opened.token_lengths,
        epochs=train.samples_before(total_steps) / train.samples.samples_per_epoch,
    )


@dataclass(frozen=True)
class Split:
    """One split of a run's data, to read without training.

    Attributes:
        batches: As training sees them on one rank.
        eod_id: See :class:`Data`.
        token_lengths: See :class:`Data`.
    """

    batches: GlobalBatches
    eod_id: int | None
    token_lengths: np.ndarray | None


def prefixes_of(config: DataConfig, split: SplitName) -> list[str]:
    """The datasets that a split is read from."""
    if split == "valid" and config.valid_prefix is not None:
        return [config.valid_prefix]
    entries = [config.prefix, *(entry.prefix for entry in config.blend or ())]
    return [prefix for prefix in entries if prefix is not None]


def open_split(
    config: DataConfig,
    split: SplitName,
    *,
    vocab_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int,
) -> Split:
    """Open one split alone, with the samples and the order that :func:`open_data` gives it.

    Args:
        config: The ``data`` section.
        split: Which.
        vocab_size: The model's.
        global_batch_size: Samples of a batch.
        micro_batch_size: Samples per forward pass.
        seed: As for :func:`open_data`.

    Raises:
        DataError: There is no such split, or its data is missing, damaged, too small or does not fit the
            model.
    """
    apart = config.valid_prefix if split == "valid" else None
    opened = _open(config, [] if apart else prefixes_of(config, split), apart, vocab_size, seed)
    batches = opened.batches(
        split, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1
    )
    if batches is None:
        shares = dict(zip(SPLITS, config.split, strict=True))
        legal = [name for name, share in shares.items() if share > 0]
        legal += ["valid"] if config.valid_prefix is not None else []
        raise DataError(f"`split` is {list(config.split)}: no {split} split; choose {' or '.join(legal)}")
    return Split(batches, opened.eod_id, opened.token_lengths)


_Described = tuple[IndexedDataset, Sidecar | None]


@dataclass(frozen=True)
class _Opened:
    """The datasets of a run, which fit each other, the tokenizer and the model."""

    config: DataConfig
    datasets: Sequence[_Described]
    held_out: _Described | None
    """Validation data of its own."""
    tokenizer: Tokenizer | None
    vocab_size: int
    seed: int

    @property
    def eod_id(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.eod_id

    @property
    def token_lengths(self) -> np.ndarray | None:
        everything = [*self.datasets, *([] if self.held_out is None else [self.held_out])]
        exact = all(sidecar is not None and sidecar.exact_bytes for _, sidecar in everything)
        return self.tokenizer.token_lengths() if self.tokenizer is not None and exact else None

    def batches(self, split: str, **sizes: Any) -> GlobalBatches | None:
        """Batches of a split, of these sizes; None if its share is 0."""
        parts = self._parts(split)
        if not parts:
            return None
        weights = [entry.weight for entry in self.config.blend or ()]
        samples: Samples = parts[0] if len(parts) == 1 else Blend(parts, weights)
        return GlobalBatches(samples, vocab_size=self.vocab_size, masked=self.config.kind == "sft", **sizes)

    def _parts(self, split: str) -> list[Samples]:
        """One split of every dataset; of ``held_out`` alone for validation where there is one.

        Parts of a blend get seeds of their own, so that datasets of equal size do not move in step.
        """
        number = SPLITS.index(split)
        if split == "valid" and self.held_out is not None:
            ranges = [(self.held_out, (0, self.held_out[0].num_documents))]
        elif self.config.split[number] > 0:
            ranges = [
                (described, split_documents(described[0].num_documents, self.config.split)[number])
                for described in self.datasets
            ]
        else:
            return []
        return [
            _samples(*described, documents, self.config, seed=self.seed + (part << 32), split=split)
            for part, (described, documents) in enumerate(ranges)
        ]


def _open(
    config: DataConfig, prefixes: Sequence[str], held_out: str | None, vocab_size: int | None, seed: int
) -> _Opened:
    """Open datasets and check them; arguments as for :func:`open_data`."""
    datasets = [IndexedDataset(prefix) for prefix in (*prefixes, *([] if held_out is None else [held_out]))]
    sidecars = [read_sidecar(dataset) for dataset in datasets]
    tokenizer = _tokenizer(config, datasets, sidecars)
    vocab_size = _vocab_size(vocab_size, datasets, sidecars, tokenizer)
    if config.mask_end_of_document and tokenizer is None:
        raise DataError(
            "`mask_end_of_document` needs a tokenizer to know the end-of-document id; set `tokenizer`"
        )
    described = list(zip(datasets, sidecars, strict=True))
    apart = None if held_out is None else described.pop()
    seed = seed if config.shuffle_seed is None else config.shuffle_seed
    return _Opened(config, described, apart, tokenizer, vocab_size, seed)


def _samples(
    dataset: IndexedDataset,
    sidecar: Sidecar | None,
    documents: tuple[int, int],
    config: DataConfig,
    *,
    seed: int,
    split: str,
) -> Samples:
    """Samples of a range of one dataset, which must be of the kind that the config says."""
    cut: dict[str, Any] = {
        "documents": documents,
        "seq_length": config.seq_length,
        "seed": seed,
        "shuffle": split == "train",
        "split": split,
    }
    if config.kind == "sft":
        mask = read_mask(dataset, sidecar)
        assert sidecar is not None
        return PackedSamples(dataset, mask, eod_id=sidecar.eod_id, share=config.packing != "none", **cut)
    if sidecar is not None and sidecar.mask is not None:
        raise DataError(
            f"dataset {dataset.prefix} holds conversations of which only answers are learnt\n"
            "write `kind`: sft; to learn all of their text, make a dataset with fp8train data prepare"
        )
    return SampleDataset(dataset, **cut)


def _tokenizer(
    config: DataConfig, datasets: Sequence[IndexedDataset], sidecars: Sequence[Sidecar | None]
) -> Tokenizer | None:
    """The tokenizer named in the config or beside the first dataset, checked against every record."""
    known = [
        (dataset.prefix, sidecar) for dataset, sidecar in zip(datasets, sidecars, strict=True) if sidecar
    ]
    if config.tokenizer is not None:
        eod_token = known[0][1].eod_token if known else None
        tokenizer = load_tokenizer(config.tokenizer, eod_token=eod_token)
    elif known:
        tokenizer = sidecar_tokenizer(*known[0])
    else:
        return None
    for prefix, sidecar in known:
        check_same_tokenizer(prefix, sidecar, tokenizer)
    return tokenizer


def _vocab_size(
    model_vocab_size: int | None,
    datasets: Sequence[IndexedDataset],
    sidecars: Sequence[Sidecar | None],
    tokenizer: Tokenizer | None,
) -> int:
    if model_vocab_size is None:
        if tokenizer is None:
            raise DataError(
                f"dataset {datasets[0].prefix} has no {sidecar_path(datasets[0].prefix).name} that names "
                "its tokenizer\nset `tokenizer`, or `vocab_size`"
            )
        return tokenizer.vocab_size
    known = [
        (f"dataset {dataset.prefix}", sidecar.vocab_size)
        for dataset, sidecar in zip(datasets, sidecars, strict=True)
        if sidecar is not None
    ]
    known += [] if tokenizer is None else [(str(tokenizer.path), tokenizer.vocab_size)]
    for what, size in known:
        if size > model_vocab_size:
            raise DataError(
                f"`vocab_size` ({model_vocab_size}) is smaller than the vocabulary of {what} ({size})\n"
                f"set it to {size}, or leave it out to take the tokenizer's"
            )
    return model_vocab_size
