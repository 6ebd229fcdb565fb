"""Blends: the greedy order against a literal implementation of its rule, shares, refused weights (row 17)."""

from fractions import Fraction

import numpy as np
import pytest

from fp8train.data.blend import Blend
from fp8train.data.errors import DataError
from fp8train.data.samples import Place


class Fake:
    """Sample j of part k is [k, j, j]."""

    def __init__(self, part: int, samples_per_epoch: int = 100) -> None:
        self.seq_length, self.samples_per_epoch = 2, samples_per_epoch
        self.description = f"part {part}"
        self.fingerprint = f"fingerprint {part}"
        self._part = part

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self._part, index, index])

    def place(self, index: int, position: int) -> Place:
        return Place(self.description, index, position)


def greedy(weights: list[Fraction], draws: int) -> list[tuple[int, int]]:
    total = sum(weights)
    drawn = [0] * len(weights)
    order = []
    for i in range(draws):
        behind = [weight / total * max(i, 1) - count for weight, count in zip(weights, drawn, strict=True)]
        part = behind.index(max(behind))
        order.append((part, drawn[part]))
        drawn[part] += 1
    return order


WEIGHTS = [
    ["0.7", "0.2", "0.1"],
    ["1", "1"],
    ["3", "1", "1", "1"],
    ["0.31", "0.69"],
    ["1"],
    ["0.015", "12", "3.5"],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_first_period_is_the_greedy_order(weights):
    blend = Blend([Fake(k) for k in range(len(weights))], [float(w) for w in weights])
    period = sum(blend.counts)
    expected = greedy([Fraction(w) for w in weights], min(period, 3000))
    assert [blend.source(i) for i in range(len(expected))] == expected


def test_order_by_hand():
    blend = Blend([Fake(0), Fake(1)], [3, 1])
    assert [blend.source(i)[0] for i in range(12)] == [0, 1, 0, 0] * 3
    assert [blend[i].tolist() for i in range(5)] == [[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 2, 2], [0, 3, 3]]
    assert blend.place(5, 1) == Place("part 1", 1, 1)


@pytest.mark.parametrize(
    "weights", [[0.7, 0.2, 0.1], [1 / 3, 0.1234567, 2**0.5], [1e-7, 1, 1], [5, 1e-3, 40]]
)
def test_shares_and_consecutive_samples(weights):
    """Every part is read in order without gaps, and never strays from its share."""
    blend = Blend([Fake(k) for k in range(len(weights))], weights)
    drawn = [0] * len(weights)
    shares = np.array(blend.counts) / sum(blend.counts)
    assert abs(shares - np.array(weights) / sum(weights)).max() < 2**-17
    assert min(blend.counts) >= 1
    for i in range(2000):
        part, number = blend.source(i)
        assert number == drawn[part]
        drawn[part] += 1
        assert np.abs(shares * (i + 1) - drawn).max() < len(weights)


def test_far_positions():
    blend = Blend([Fake(0), Fake(1), Fake(2)], [0.7, 0.2, 0.1])
    assert sorted(blend.source(10**12 + i) for i in range(10)) == sorted(
        [(0, 7 * 10**11 + j) for j in range(7)] + [(1, 2 * 10**11 + j) for j in range(2)] + [(2, 10**11)]
    )


def test_size_and_fingerprint():
    one = Blend([Fake(0, 10), Fake(1, 5)], [1, 1])
    assert one.samples_per_epoch == 15
    assert one.fingerprint == Blend([Fake(0), Fake(1)], [2, 2]).fingerprint
    assert one.fingerprint != Blend([Fake(0), Fake(1)], [1, 2]).fingerprint
    assert one.fingerprint != Blend([Fake(1), Fake(0)], [1, 1]).fingerprint
    assert one.description == "blend of part 0 + part 1"


@pytest.mark.parametrize("weight", [0, 0.0, -0.5, float("nan"), float("inf")])
def test_bad_weights(weight):
    with pytest.raises(DataError, match=rf"weight {weight} of part 1 must be larger than 0"):
        Blend([Fake(0), Fake(1)], [1, weight])


def test_wrong_number_of_weights():
    with pytest.raises(DataError, match="2 datasets but 1 weights"):
        Blend([Fake(0), Fake(1)], [1])
    with pytest.raises(DataError, match="0 datasets"):
        Blend([], [])
