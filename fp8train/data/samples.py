"""Documents to samples of ``seq_length + 1`` tokens, in a global order that depends on nothing but the data
and the seed.

One epoch lays the documents of a split end to end, in a fresh random order, and cuts the stream every
``seq_length`` tokens: sample j is tokens ``[j S, (j + 1) S]``, one more than it predicts, so consecutive
samples share one token and every token but the first is predicted exactly once. The last partial sample of an
epoch (fewer than S targets) is dropped. The samples of an epoch are then drawn in a second random order,
without which a few huge documents would be read front to back.

Differences from Megatron's GPTDataset: there all epochs form one stream, shuffled jointly; here every epoch
is shuffled by itself, so sample i costs one binary search, the number of steps need not be known, and nothing
is cached on disk (Megatron's cache survives a rewritten dataset). Validation keeps file order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.data.permutation import Permutation

SPLITS = ("train", "valid", "test")
_EPOCHS_KEPT = 2  # a global batch may straddle two
_DOCUMENTS_KEY, _SAMPLES_KEY = 1, 2  # keep the two permutations of an epoch apart


@dataclass(frozen=True)
class Place:
    """Where a token comes from: token ``offset`` of document ``document`` of dataset ``prefix``."""

    prefix: str
    document: int
    offset: int


class Samples(Protocol):
    """An endless sequence of samples: one dataset, or a blend."""

    seq_length: int
    samples_per_epoch: int

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample ``index >= 0`` of the global order: int64 ``[seq_length + 1]``."""
        ...

    def place(self, index: int, position: int) -> Place:
        """Where token ``position`` of sample ``index`` comes from."""
        ...

    @property
    def description(self) -> str:
        """Name and size, for messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the samples and their order."""
        ...


def split_documents(num_documents: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Cut documents into consecutive ranges, one per share.

    The bounds are ``round(cumulative share * num_documents)`` in file order: equal to Megatron's for datasets
    with one sequence per document, which is what both projects' preprocessing writes (Megatron cuts over
    sequences).

    Returns:
        ``(first, last + 1)`` per share; disjoint, and together all documents.
    """
    normalised = [share / sum(shares) for share in shares]
    bounds = [0, *(round(cumulative * num_documents) for cumulative in accumulate(normalised))]
    return list(pairwise(bounds))


def epoch_and_number(index: int, samples_per_epoch: int, seed: int | None) -> tuple[int, int]:
    """Epoch of sample ``index``, and which sample of that epoch's stream it is; without a seed the stream is
    the same in all epochs, and read as it is: epoch 0."""
    assert index >= 0
    epoch, position = divmod(index, samples_per_epoch)
    if seed is None:
        return 0, position
    return epoch, Permutation(samples_per_epoch, (seed, epoch, _SAMPLES_KEY))[position]


class SampleDataset:
    """The samples of a range of documents, in a global order.

    Args:
        dataset: Where the tokens are.
        documents: ``(first, last + 1)``.
        seq_length: S; samples hold S + 1 tokens.
        seed: Of both shuffles.
        shuffle: False keeps documents and samples in file order (validation); every epoch is then the same.
        split: Name of the range, for messages.

    Attributes:
        samples_per_epoch: ``(tokens - 1) // S``.

    Raises:
        DataError: The range does not hold one sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        *,
        documents: tuple[int, int],
        seq_length: int,
        seed: int,
        shuffle: bool = True,
        split: str = "train",
    ) -> None:
        self.dataset = dataset
        self.documents = documents
        self.seq_length = seq_length
        self._seed, self._shuffle, self._split = seed, shuffle, split
        first, end = documents
        assert 0 <= first <= end <= dataset.num_documents
        offsets = dataset.document_offsets
        self._first_token = int(offsets[first])
        self.num_tokens = int(offsets[end]) - self._first_token
        self.samples_per_epoch = max(self.num_tokens - 1, 0) // seq_length
        if self.samples_per_epoch == 0:
            raise DataError(
                f"{self.description}: needed for one sample: {seq_length + 1} tokens (`seq_length` + 1); "
                f"present: {self.num_tokens}\ngive more text, a larger share in `split`, or a smaller "
                "`seq_length`; `split`=[1,0,0] trains on all of it"
            )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def description(self) -> str:
        """Name and size, for messages."""
        documents = self.documents[1] - self.documents[0]
        return f"{self.dataset.prefix} ({self._split}: {documents} documents, {self.num_tokens} tokens)"

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the dataset's content, the range, sequence length and shuffle."""
        parts = (
            self.dataset.fingerprint(),
            self.documents,
            self.seq_length,
            self._shuffle and self._seed,
            self._shuffle,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample ``index >= 0`` of the global order: int64 ``[seq_length + 1]``."""
        epoch, number = self._epoch_and_number(index)
        start, length = number * self.seq_length, self.seq_length + 1
        if not self._shuffle:
            begin = self._first_token + start
            return self.dataset.tokens(begin, begin + length).astype(np.int64)
        order, starts = self._order(epoch)
        sample = np.empty(length, dtype=np.int64)
        slot = int(np.searchsorted(starts, start, side="right")) - 1
        skip, filled = start - int(starts[slot]), 0
        while filled < length:
            tokens = self.dataset.document(int(order[slot]))[skip : skip + length - filled]
            sample[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            slot, skip = slot + 1, 0
        return sample

    def place(self, index: int, position: int) -> Place:
        """Where token ``position`` of sample ``index`` comes from."""
        epoch, number = self._epoch_and_number(index)
        token = number * self.seq_length + position
        if not self._shuffle:
            return Place(self.dataset.prefix, *self.dataset.place(self._first_token + token))
        order, starts = self._order(epoch)
        slot = int(np.searchsorted(starts, token, side="right")) - 1
        return Place(self.dataset.prefix, int(order[slot]), token - int(starts[slot]))

    def _epoch_and_number(self, index: int) -> tuple[int, int]:
        return epoch_and_number(index, self.samples_per_epoch, self._seed if self._shuffle else None)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document numbers of an epoch in order, int64 ``[D]``, and the first token of each in its stream."""
        if epoch not in self._orders:
            first, end = self.documents
            permutation = Permutation(end - first, (self._seed, epoch, _DOCUMENTS_KEY))
            order = first + permutation[np.arange(end - first)]
            offsets = self.dataset.document_offsets
            starts = np.zeros(end - first, dtype=np.int64)
            np.cumsum((offsets[order + 1] - offsets[order])[:-1], out=starts[1:])
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = (order, starts)
        return self._orders[epoch]
