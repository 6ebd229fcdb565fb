"""Device functions for matrices that are cast tile by tile, as they are and transposed.

A matrix [M, K] is cut into tiles; a program makes the values of one, and stores its codes at once in both
layouts that Hopper's tensor cores ask for. Codes are padded with zeros to the sizes of their memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8train.kernels.gpu.codes import encode_fp8, exponent_from_amax, is_finite, largest_magnitude, pow2

TILE_ROWS = 64
TILE_COLUMNS = 128
PARTIALS = 1024
"""Most programs of a kernel that finds an amax; each leaves one number, which the next kernel reads."""


@triton.jit
def own_scale(amax, POWER_OF_TWO: tl.constexpr, MAX_EXPONENT: tl.constexpr, MARGIN: tl.constexpr):
    """(scale, scale_inv) of FP32 amaxes of any shape, as ``scale_from_amax`` defines them; ``scale_inv`` is
    NaN where an amax is not finite."""
    finite = is_finite(amax)
    if POWER_OF_TWO:
        k = exponent_from_amax(tl.where(finite, amax, 0.0), MAX_EXPONENT - MARGIN)
        scale, scale_inv = pow2(k), pow2(-k)
    else:
        LARGEST: tl.constexpr = 1.75 * 2.0 ** (MAX_EXPONENT - MARGIN)
        LIMIT: tl.constexpr = 2.0**126
        known = finite & (amax > 0)
        ratio = tl.div_rn(tl.full(amax.shape, LARGEST, tl.float32), tl.where(known, amax, 1.0))
        ratio = tl.minimum(tl.maximum(ratio, 1.0 / LIMIT), LIMIT)
        scale = tl.where(known, ratio, 1.0)
        scale_inv = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    return scale, tl.where(finite, scale_inv, float("nan"))


@triton.jit
def operand_scale(
    partials,
    count,
    delayed,
    DELAYED: tl.constexpr,
    CONSTANT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MARGIN: tl.constexpr,
    MOST: tl.constexpr,
):
    """(scale, scale_inv, amax) of one tensor, as ``scale_from_amax`` defines them; every program finds them
    itself.

    Args: ``partials``: FP32 [count], whose largest is the amax; ``delayed``: FP32 scalar, read if
    ``DELAYED``, 0 for none yet; ``CONSTANT``: exponent of a constant scale, or None; ``MOST``: a power of
    two, ``count`` or more.
    """
    at = tl.arange(0, MOST)
    amax = largest_magnitude(tl.load(partials + at, mask=at < count, other=0.0), 0)
    finite = is_finite(amax)
    if CONSTANT is not None:
        scale = pow2(tl.full((), CONSTANT, tl.int32))
        scale_inv = pow2(tl.full((), -CONSTANT, tl.int32))
    else:
        scale, scale_inv = own_scale(amax, POWER_OF_TWO, MAX_EXPONENT, MARGIN)
    if DELAYED:
        earlier = tl.load(delayed)
        known = earlier > 0
        if POWER_OF_TWO:
            inverse = (0x7F000000 - earlier.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        else:
            inverse = tl.div_rn(tl.full((), 1.0, tl.float32), tl.where(known, earlier, 1.0))
        scale = tl.where(known, earlier, scale)
        scale_inv = tl.where(known, inverse, scale_inv)
    return scale, tl.where(finite, scale_inv, float("nan")), amax


@triton.jit
def store_straight(code, straight, row, column, rows, columns):
    """Store a tile's codes (uint8) that lie at int64 ``row`` [r] and ``column`` [c]; ``straight``: uint8
    [rows, columns]."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(straight + row[:, None] * columns + column[None, :], code, mask=inside)


@triton.jit
def store_turned(code, turned, row, column, rows, columns):
    """Store a tile's codes transposed, as :func:`store_straight`; ``turned``: uint8 [columns, rows]."""
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(turned + column[:, None] * rows + row[None, :], tl.trans(code), mask=inside)


@triton.jit
def store_operand(
    values,
    scale,
    row,
    column,
    straight,
    turned,
    rows,
    columns,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    MANTISSA: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Cast a tile of FP32 values [r, c] and store it.

    Args: ``row``, ``column``: int64 indices [r], [c]; ``straight``: uint8 [rows, columns], written if
    ``STRAIGHT``; ``turned``: uint8 [columns, rows], written if ``TURNED``. Both sizes include padding, for
    which ``values`` are 0.
    """
    code = encode_fp8(values * scale, MANTISSA, HARDWARE)
    if STRAIGHT:
        store_straight(code, straight, row, column, rows, columns)
    if TURNED:
        store_turned(code, turned, row, column, rows, columns)
