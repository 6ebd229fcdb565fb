"""The stateless permutation: a bijection, the same for scalars and arrays, fixed for ever, well mixed."""

import numpy as np
import pytest

from fp8train.data.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 255, 256, 257, 5000, 65537])
def test_bijection(size):
    permutation = Permutation(size, (7, size))
    many = permutation[np.arange(size)]
    assert many.dtype == np.int64
    assert np.array_equal(np.sort(many), np.arange(size))
    assert [permutation[position] for position in range(min(size, 300))] == many[:300].tolist()


def test_large_sizes_need_no_memory():
    permutation = Permutation(10**15, (1,))
    values = [permutation[position] for position in (0, 1, 10**15 - 1)]
    assert len(set(values)) == 3
    assert all(0 <= value < 10**15 for value in values)
    assert permutation[np.array([0, 1, 10**15 - 1])].tolist() == values


def test_the_order_is_fixed():
    """Runs resume on these numbers: they may never change."""
    assert Permutation(10, (1, 0))[np.arange(10)].tolist() == [6, 4, 5, 2, 3, 7, 9, 1, 0, 8]
    assert Permutation(10, (1, 1))[np.arange(10)].tolist() == [1, 4, 0, 3, 9, 2, 5, 6, 7, 8]


def test_every_word_of_the_key_counts():
    keys = [(1, 2), (2, 1), (1, 2, 0), (1, 3), (1 + (1 << 32), 2), (1,)]
    orders = {tuple(Permutation(100, key)[np.arange(100)].tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_uniform():
    """Where element 0 lands, 6000 keys and 6 places: chi-square, 5 degrees of freedom, 0.1 % point 20.5."""
    landed = [int(np.argmin(Permutation(6, (key,))[np.arange(6)])) for key in range(6000)]
    counts = np.bincount(landed, minlength=6)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 20.5


def test_neighbours_are_scattered():
    values = Permutation(100_000, (3,))[np.arange(100_000)]
    assert abs(float(np.corrcoef(values[:-1], values[1:])[0, 1])) < 0.02
    assert abs(float(np.corrcoef(values, np.arange(100_000))[0, 1])) < 0.02
