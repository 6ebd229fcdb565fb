"""FP32 numbers in two halves of 16 bits: the nearest BF16 number, and what it lacks.

An FP32 number, read as an integer ``u``, is cut into ``high = (u + 2^15) >> 16`` and ``low = u - (high <<
16)``, which lies in [-2^15, 2^15): ``high`` are the bits of the nearest BF16 number and ``high · 2^16 + low``
is ``u`` again. So master and BF16 weight together take the 4 bytes of FP32. Exact ties go away from zero:
with ties to even, the two numbers half-way below and above an even ``high`` would have the same (high, low).
One FP32 number in 131072 is a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_remainder(values: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) of FP32 values: int32 of their shape, both within 16 bits; nothing is rounded."""
    bits = values.view(torch.int32)
    high = (bits + (1 << 15)).bitwise_right_shift_(16)
    return high, (high << 16).neg_().add_(bits)


def join_remainder(high: Tensor, low: Tensor) -> Tensor:
    """FP32 values, bit for bit, of their halves: int16 each."""
    return high.to(torch.int32).bitwise_left_shift_(16).add_(low).view(torch.float32)
