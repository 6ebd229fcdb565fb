"""Random access to a pseudo-random permutation, without storing it.

A Feistel network permutes ``[0, 2^b)`` whatever its round function is; walking along its cycle until the
value is below n restricts it to ``[0, n)``. Position i costs a dozen integer operations and no memory, where
a stored permutation of a trillion-token dataset takes gigabytes per process. The order depends on (n, key)
only: unlike ``numpy.random.Generator`` streams, which numpy may change between versions, it is defined here,
so a resumed run sees the same data for ever.

Mixing: the finaliser of SplitMix64 (Steele, Lea, Flood 2014); Feistel shuffling: Black and Rogaway 2002,
section 5.
"""

from __future__ import annotations

from typing import TypeVar, overload

import numpy as np

_ROUNDS = 8
_CHUNK = 1 << 14  # temporaries stay in the cache
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_Words = TypeVar("_Words", int, np.ndarray)


class Permutation:
    """The permutation of ``range(size)`` that belongs to ``key``.

    Args:
        size: n >= 1, below 2^62.
        key: Integers; every one of them changes the order.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert 1 <= size < 1 << 62
        self._size = size
        bits = max((size - 1).bit_length(), 2)
        self._low_bits, self._high_bits = bits // 2, bits - bits // 2
        state = _GOLDEN
        for word in key:
            state = _mix(state ^ _mix((word & _MASK64) + _GOLDEN))
        self._round_keys = [_mix(state + _GOLDEN * (number + 1)) for number in range(_ROUNDS)]

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: np.ndarray) -> np.ndarray: ...
    def __getitem__(self, position: int | np.ndarray) -> int | np.ndarray:
        """Element(s) at ``position``: an int in ``[0, size)``, or an int64 array of them."""
        if isinstance(position, np.ndarray):
            chunks = [self._chunk(position[i : i + _CHUNK]) for i in range(0, len(position), _CHUNK)]
            return np.concatenate([np.empty(0, dtype=np.int64), *chunks])
        assert 0 <= position < self._size
        value = self._once(int(position))
        while value >= self._size:
            value = self._once(value)
        return value

    def _chunk(self, positions: np.ndarray) -> np.ndarray:
        values = self._once(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self._size)
        while len(outside):
            again = self._once(values[outside])
            values[outside] = again
            outside = outside[again >= self._size]
        return values.astype(np.int64)

    def _once(self, value: _Words) -> _Words:
        low, high = self._low_bits, self._high_bits
        for key in self._round_keys:
            left, right = value >> low, value & ((1 << low) - 1)
            # The halves swap places, and so do their widths where the number of bits is odd.
            value = (right << high) | (left ^ (_mix(right + key) & ((1 << high) - 1)))
            low, high = high, low
        return value


def _mix(value: _Words) -> _Words:
    """Of an int, or of each element of a uint64 array, which wraps by itself."""
    value = value & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
