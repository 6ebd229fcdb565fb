"""The two FP8 formats once more, from their definition alone: Python floats, no torch, nothing of fp8train.

``decode`` reads sign, exponent and mantissa fields. ``encode`` finds the two neighbours of a value in
the sorted table of codes and takes the nearer one, or the even code of a tie.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Table:
    """An FP8 format as OFP8 1.0 defines it; ``has_infinity`` tells E5M2 from E4M3's single NaN per sign."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_infinity: bool

    def decode(self, code: int) -> float:
        sign = -1.0 if code & 0x80 else 1.0
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = (code & 0x7F) >> self.mantissa_bits
        top = (1 << self.exponent_bits) - 1
        if exponent == top and self.has_infinity:
            return math.nan if mantissa else sign * math.inf
        if exponent == top and mantissa == (1 << self.mantissa_bits) - 1:
            return math.nan
        fraction = mantissa / 2**self.mantissa_bits
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - self.bias)
        return sign * (1 + fraction) * 2.0 ** (exponent - self.bias)

    @property
    def positive(self) -> list[float]:
        """Finite non-negative values in ascending order; the index is the code."""
        values = [self.decode(code) for code in range(128)]
        return [value for value in values if math.isfinite(value)]

    @property
    def max(self) -> float:
        return self.positive[-1]

    def encode(self, value: float) -> int:
        """Code of ``value`` (not NaN): clamped to ±max, rounded to nearest, ties to the even code."""
        sign = 0x80 if math.copysign(1.0, value) < 0 else 0
        values = self.positive
        magnitude = min(abs(value), values[-1])
        below = bisect_right(values, magnitude) - 1
        if values[below] == magnitude:
            return sign | below
        down = Fraction(magnitude) - Fraction(values[below])
        up = Fraction(values[below + 1]) - Fraction(magnitude)
        if down != up:
            return sign | (below if down < up else below + 1)
        return sign | (below if below % 2 == 0 else below + 1)


E4M3_TABLE = Table(exponent_bits=4, mantissa_bits=3, bias=7, has_infinity=False)
E5M2_TABLE = Table(exponent_bits=5, mantissa_bits=2, bias=15, has_infinity=True)
