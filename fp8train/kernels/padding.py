"""Padding of quantised matrices with zeros to what FP8 tensor cores multiply.

Padding comes after the amax was taken and multiplies to nothing, so it changes no value.
"""

from __future__ import annotations

from torch import Tensor, uint8
from torch.nn import functional as F

ALIGNMENT = 16
"""Sizes of operands are multiples of this."""

Operand = tuple[Tensor, Tensor]
"""(payload, scale_inv): a matrix, and its scales as :mod:`fp8train.numerics.granularity` describes them."""


def aligned(size: int) -> int:
    """``size`` rounded up to a multiple of 16."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def pad_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad a matrix (FP8 too: through its bytes) to [rows, columns]; itself if it has that shape."""
    if x.shape == (rows, columns):
        return x
    padding = (0, columns - x.shape[1], 0, rows - x.shape[0])
    if x.element_size() == 1:
        return F.pad(x.view(uint8), padding).view(x.dtype)
    return F.pad(x, padding)


def padded(operand: Operand) -> Operand:
    """The operand with its payload padded to multiples of 16, and with scales of 1 for new rows or columns
    that have scales of their own. Blocks are multiples of 16: there are no more of them."""
    payload, scale_inv = operand
    rows, columns = aligned(payload.shape[0]), aligned(payload.shape[1])
    if scale_inv.dim() and payload.shape != (rows, columns):
        more = [
            new - old if count == old and old > 1 else 0
            for new, old, count in zip((rows, columns), payload.shape, scale_inv.shape, strict=True)
        ]
        scale_inv = F.pad(scale_inv, (0, more[1], 0, more[0]), value=1.0)
    return pad_to(payload, rows, columns), scale_inv
