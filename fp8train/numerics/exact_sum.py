"""Sums of squares that do not depend on how the elements are split, in one INT64.

Ranks that hold parts of a parameter must agree on its norm to the bit, whatever the parts are. So each square
is rounded to a grid that is agreed beforehand, alone and always in the same way, and the grid points are
added as integers, which is exact in any order: partial sums of any split add up to the same INT64.

**The grid.** A parameter has n elements (all of them, not a rank's part) of magnitude at most M. Its squares
are counted in units of ``2^shift``, with the smallest shift for which ``n · M² < 2^(62 + shift)``.

**No overflow.** One grid point is ``round(x² / 2^shift)``, computed in FP64: x rounds once (it may have more
than 53 bits), the square rounds once, the power of two is exact. Hence it is at most
``x² / 2^shift · (1 + 2^-51) + 1/2``, and all n of them together are below
``2^62 · (1 + 2^-51) + n/2 < 2^63`` for every n up to 2^61. Grid points are not negative, so a partial sum is
no larger than the whole.

**Error.** With S the true sum, each grid point is off by at most ``1/2 + x² / 2^shift · 2^-51``, so the sum
is off by at most ``n · 2^(shift-1) + S · 2^-51``. The shift is 0, and only the second term left, where
``n · M² < 2^62``. Otherwise ``2^shift <= n · M² · 2^-61 · (1 + 2^-49)``, and with r the root mean square of
the elements the relative error of the norm, half that of S, is at most::

    n · (M / r)² · 2^-63 · (1 + 2^-19) + 2^-51          (below 2^-20 for n · (M / r)² <= 2^42)

A matrix of 2^26 elements may have M = 256 r, one of 2^20 may have M = 2048 r. Errors of rounding to nearest
have both signs: what is seen is smaller by about the square root of n.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SUM_BITS = 62
_CHUNK = 1 << 20
_SLACK = 1 + 2.0**-50  # above the three roundings of a product in FP64


def square_shift(numel: Tensor, largest: Tensor) -> Tensor:
    """The grid of parameters: bits by which their squares are shifted; see the module.

    Args:
        numel: elements of each whole parameter, int64, below 2^53.
        largest: no element's magnitude exceeds it: FP64, finite, same shape.

    Returns:
        int32 of the same shape, >= 0.
    """
    bound = numel.double() * largest.square() * _SLACK
    return (torch.frexp(bound).exponent - _SUM_BITS).clamp(min=0).to(torch.int32)


def grid_square_sum(x: Tensor, shift: int | Tensor, *, chunk: int = _CHUNK) -> Tensor:
    """The sum of x² in units of ``2^shift``; parts of a parameter add up to the whole exactly.

    Widens ``chunk`` elements at a time and does not wait for the device.

    Args:
        x: int32 or int64 [n], contiguous.
        shift: 0 to 1022, or such an integer scalar tensor on x's device; of the whole parameter, see
            :func:`square_shift`.
        chunk: elements per piece. Changes memory, not the result.

    Returns:
        int64 scalar.
    """
    assert x.dtype in (torch.int32, torch.int64), x.dtype
    inverse = power_of_two_fp64(-torch.as_tensor(shift, device=x.device))
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in x.split(chunk):
        total += part.double().square_().mul_(inverse).round_().to(torch.int64).sum()
    return total


def power_of_two_fp64(exponent: Tensor) -> Tensor:
    """``2^exponent`` as FP64, exactly. Args: integers in [-1022, 1023]."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
