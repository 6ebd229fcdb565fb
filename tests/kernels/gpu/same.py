"""Equality to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        both = a.float().isnan() & b.float().isnan()
    else:
        both = torch.zeros_like(a, dtype=torch.bool)
    bits = [x.contiguous().view(_BITS[x.element_size()]) for x in (a, b)]
    return bool(((bits[0] == bits[1]) | both).all())
