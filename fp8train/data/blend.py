"""A weighted mixture of datasets with a fixed global order.

Sample i comes from the dataset that is furthest behind its share: the k with the largest ``w_k max(i, 1) -
drawn_k``, the first of several (Megatron's BlendedDataset). After any number of draws every dataset is within
one sample of its share per competitor, and the order is the same on every rank.

Computed draw by draw that order costs time and memory that grow with the run. Weights written as integers
``c_k`` with sum Q make it periodic: with ``d_k = c_k i / Q - drawn_k`` (sum 0) the largest is never negative,
so every d_k stays above -1; at i = Q all are integers, hence none is negative, hence all are 0, and the state
is that of i = 0. So one period is computed and every sample is found in constant time. Weights as people
write them (0.7, 0.2, 0.1) give exact integers; others are rounded to multiples of 2^-18, and no dataset is
rounded away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from fp8train.data.errors import DataError
from fp8train.data.samples import Place, Samples

_MAX_PERIOD = 1 << 18


class Blend:
    """An endless mixture of datasets; one that runs out starts its next epoch.

    Args:
        datasets: The parts, all with the same ``seq_length``.
        weights: Shares of samples; any positive scale.

    Attributes:
        samples_per_epoch: Distinct samples of all parts together.

    Raises:
        DataError: A weight is not positive, or the numbers of weights and datasets differ.
    """

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[float]) -> None:
        if not datasets or len(datasets) != len(weights):
            raise DataError(f"`blend`: {len(datasets)} datasets but {len(weights)} weights")
        for dataset, weight in zip(datasets, weights, strict=True):
            if not 0 < weight < float("inf"):
                raise DataError(
                    f"`blend`: weight {weight} of {dataset.description} must be larger than 0; "
                    "remove the dataset from the blend to leave it out"
                )
        assert len({dataset.seq_length for dataset in datasets}) == 1
        self.datasets = tuple(datasets)
        self.seq_length = datasets[0].seq_length
        self.samples_per_epoch = sum(dataset.samples_per_epoch for dataset in datasets)
        self.counts = _integer_weights(weights)
        self._period = sum(self.counts)
        self._part, self._rank = _one_period(self.counts)

    @property
    def description(self) -> str:
        """Names and sizes, for messages."""
        return "blend of " + " + ".join(dataset.description for dataset in self.datasets)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the parts and their weights."""
        parts = ([dataset.fingerprint for dataset in self.datasets], self.counts)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def source(self, index: int) -> tuple[int, int]:
        """Which part sample ``index`` comes from, and which of that part's samples it is."""
        periods, position = divmod(index, self._period)
        part = int(self._part[position])
        return part, periods * self.counts[part] + int(self._rank[position])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample ``index >= 0`` of the global order: int64 ``[seq_length + 1]``."""
        part, number = self.source(index)
        return self.datasets[part][number]

    def place(self, index: int, position: int) -> Place:
        """Where token ``position`` of sample ``index`` comes from."""
        part, number = self.source(index)
        return self.datasets[part].place(number, position)


def _integer_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the proportion of ``weights``: exact if their sum stays small, else rounded to a sum of
    2^18.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]  # the decimal written, not its binary value
    scale = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total <= _MAX_PERIOD:
        return counts
    shares = [Fraction(count, total) * _MAX_PERIOD for count in counts]
    rounded = [max(1, int(share)) for share in shares]
    while (missing := _MAX_PERIOD - sum(rounded)) != 0:
        step = 1 if missing > 0 else -1
        by_error = sorted(range(len(rounded)), key=lambda k: step * (rounded[k] - shares[k]))
        for k in [k for k in by_error if rounded[k] + step >= 1][: abs(missing)]:
            rounded[k] += step
    return rounded


def _one_period(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Part of every draw of a period, int32 ``[Q]``, and how often that part was drawn before in it, int32
    ``[Q]``.
    """
    period = sum(counts)
    shares = np.array(counts, dtype=np.int64)
    drawn = np.zeros(len(counts), dtype=np.int64)
    parts = np.empty(period, dtype=np.int32)
    ranks = np.empty(period, dtype=np.int32)
    for draw in range(period):
        part = int(np.argmax(shares * max(draw, 1) - drawn * period))
        parts[draw], ranks[draw] = part, drawn[part]
        drawn[part] += 1
    assert drawn.tolist() == list(counts)
    return parts, ranks
