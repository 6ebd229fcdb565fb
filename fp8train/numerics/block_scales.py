"""Block scales: one power-of-two scale for each run of up to 128 elements along a tensor's last dimension.

A scale is stored as an E8M0 byte, ``2^(byte - 127)``, and multiplies the payload: it is the ``scale_inv``
of the block. It is the smallest power of two that brings the block's amax within the format (rounded *up*,
as OCP MX 1.0 does not but safe training needs: nothing saturates). Byte 255 is NaN and marks a block whose
source was not finite, so no infinity is hidden by a saturating cast.

Blocks start at column 0 of the *logical* tensor and never cross a row, so a tensor cut at a block boundary
has the blocks of the whole. The block is the largest divisor of the row length that is at most 128 (and at
least 32): 128 for the widths of large models, 96 for 192, with nothing to pad. A row without such a divisor
is cut into blocks of 128 with a short one at its end, stored as if zeros followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.numerics.cast import cast, decode_finite
from fp8train.numerics.granularity import amax_along
from fp8train.numerics.scale import exponent_from_amax, power_of_two
from fp8train.numerics.stochastic import cast_stochastic
from fp8train.precision.number_formats import Format

_BIAS = 127
_NAN = 255


def as_blocks(x: Tensor, block: int) -> Tensor:
    """Arrange ``x`` as a matrix of blocks, one block to a row.

    Args:
        x: [.., K]; a view is returned where K is a multiple of ``block``, else rows are padded with zeros.
        block: elements of a block.

    Returns:
        [rows · ceil(K / block), block].
    """
    rows = x.reshape(-1, x.shape[-1])
    short = -x.shape[-1] % block
    if short:
        rows = torch.nn.functional.pad(rows, (0, short))
    return rows.reshape(-1, block)


def from_blocks(blocks: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of :func:`as_blocks`: [.., block] back to ``shape``, padding dropped."""
    length = shape[-1]
    padded = -(-length // blocks.shape[-1]) * blocks.shape[-1]
    return blocks.reshape(-1, padded)[:, :length].reshape(shape)


def block_amax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block, NaN where it holds NaN. Shapes: [.., block] -> FP32 [..]."""
    return amax_along(blocks, -1).float()


def encode_e8m0(exponent: Tensor, finite: Tensor) -> Tensor:
    """E8M0 bytes of ``2^exponent``; NaN where not ``finite``. Args: int32 in [-126, 126], bool; -> uint8."""
    return torch.where(finite, exponent + _BIAS, _NAN).to(torch.uint8)


def decode_e8m0(scales: Tensor) -> Tensor:
    """FP32 values of E8M0 bytes (uint8), 255 becoming NaN. Bytes 1 to 254 are exact powers of two."""
    value = (scales.to(torch.int32) << 23).view(torch.float32)
    return torch.where(scales == _NAN, torch.nan, value)


def quantize_blocks(blocks: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Quantise each block with its own power-of-two scale, to nearest.

    Args:
        blocks: [.., block], any float dtype.
        fmt: payload format.

    Returns:
        (payload [.., block] in ``fmt.dtype``, E8M0 bytes uint8 [..]).
    """
    amax = block_amax(blocks)
    finite = torch.isfinite(amax)
    k = exponent_from_amax(torch.where(finite, amax, 0.0), max_exponent=fmt.max_exponent)
    payload = cast(blocks, fmt, power_of_two(k).unsqueeze(-1), scale_is_power_of_two=True)
    return payload, encode_e8m0(-k, finite)


def quantize_blocks_stochastic(blocks: Tensor, fmt: Format, bits: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_blocks` of finite blocks, with stochastic rounding. ``bits``: int32 random patterns of
    the blocks' shape."""
    amax = block_amax(blocks)
    k = exponent_from_amax(amax, max_exponent=fmt.max_exponent)
    payload = cast_stochastic(blocks, fmt, power_of_two(k).unsqueeze(-1), bits)
    return payload, encode_e8m0(-k, torch.isfinite(amax))


def dequantize_blocks(payload: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode blocks: each code times the scale of its block.

    Args:
        payload: FP8 [.., block], finite codes (what :func:`quantize_blocks` makes of finite blocks).
        scales: E8M0 bytes uint8 [..].
        dtype: FP32 or FP64: the product is exact unless it underflows.
    """
    return decode_finite(payload, dtype).mul_(decode_e8m0(scales).to(dtype).unsqueeze(-1))
