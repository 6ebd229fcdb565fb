"""Device functions: FP8 codes, scales and random bits, to the bit as :mod:`fp8train.numerics` defines them.

A format is told by its mantissa bits: 3 for E4M3, 2 for E5M2, 10 for FP16 (whose codes have 16 bits).
``HARDWARE`` lets a GPU's own conversion encode FP8; without it integer arithmetic does, for Triton's
interpreter, whose conversion rounds wrongly next to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode_fp8(x, MANTISSA: tl.constexpr, HARDWARE: tl.constexpr):
    """FP8 codes (uint8) of FP32 values that are scaled already: saturating, to nearest even; NaN stays
    NaN."""
    BIAS: tl.constexpr = (1 << (6 - MANTISSA)) - 1
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
    if HARDWARE:
        if MANTISSA == 3:
            code = magnitude.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)
        else:
            code = magnitude.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.uint32)
    else:
        SHIFT: tl.constexpr = 23 - MANTISSA
        word = magnitude.to(tl.uint32, bitcast=True)
        rounded = word + ((1 << (SHIFT - 1)) - 1) + ((word >> SHIFT) & 1)
        normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA)
        # Subnormal codes count units of 2^(1 - BIAS - MANTISSA): FP32 numbers of this size have that unit.
        BASE: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
        subnormal = (magnitude + BASE).to(tl.uint32, bitcast=True) & 0xFF
        SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
        code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    code = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def decode_fp8(code, MANTISSA: tl.constexpr, HARDWARE: tl.constexpr = False):
    """FP32 values of finite FP8 codes (uint8), as ``decode_finite``: special codes become large numbers, or
    what they stand for with ``HARDWARE``, which takes fewer instructions."""
    if HARDWARE:
        if MANTISSA == 3:
            values = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            values = code.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        BIAS: tl.constexpr = (1 << (6 - MANTISSA)) - 1
        wide = code.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << (23 - MANTISSA))
        FACTOR: tl.constexpr = 2.0 ** (127 - BIAS)
        values = bits.to(tl.float32, bitcast=True) * FACTOR
    return values


@triton.jit
def pow2(exponent):
    """``2^exponent`` in FP32, exactly, of int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_from_amax(amax, MAX_EXPONENT: tl.constexpr):
    """Exponent of the largest power-of-two scale that keeps a finite ``amax`` (FP32, >= 0) in the format
    whose largest value is ``1.75 · 2^MAX_EXPONENT``; 0 for amax 0."""
    exponent = (amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
    k = tl.minimum(tl.maximum(MAX_EXPONENT + 127 - exponent, -126), 126)
    return tl.where(amax == 0, 0, k)


@triton.jit
def encode_e8m0(exponent, finite):
    """E8M0 bytes of ``2^exponent``; 255, NaN, where not ``finite``."""
    return tl.where(finite, exponent + 127, 255).to(tl.uint8)


@triton.jit
def decode_e8m0(byte):
    """FP32 values of E8M0 bytes; 255 becomes NaN, 0 becomes 0 as in the reference."""
    word = byte.to(tl.uint32)
    return tl.where(word == 255, 0x7FC00000, word << 23).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """Whether FP32 values are neither infinite nor NaN."""
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def widen(x, HARDWARE: tl.constexpr):
    """FP32 values of floats of up to 32 bits. Triton's interpreter loses the subnormal numbers of BF16."""
    if HARDWARE:
        return x.to(tl.float32)
    elif x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, HARDWARE: tl.constexpr):
    """FP32 values rounded to BF16, to nearest even. Triton's interpreter truncates."""
    if HARDWARE:
        return x.to(tl.bfloat16)
    bits = x.to(tl.uint32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    kept = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, nearest) >> 16
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def largest(a, b):
    """The larger of two FP32 values; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr):
    """Largest magnitude of FP32 values along an axis; NaN where there is one. Magnitudes order as their bits
    do, NaN above infinity."""
    bits = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def random_bits(key, index):
    """Uniform uint32 patterns of elements by logical index (uint32, modulo 2^32) under a 32-bit key."""
    return _mix(index.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))


@triton.jit
def round_stochastic(x, bits, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """FP32 values of a format (``MANTISSA`` bits, smallest normal number ``2^MIN_EXPONENT``) that FP32
    values within its range are stochastically rounded to."""
    DROP: tl.constexpr = 23 - MANTISSA
    MASK: tl.constexpr = (1 << DROP) - 1
    word = x.to(tl.uint32, bitcast=True)
    rounded = ((word + (bits & MASK)) & (0xFFFFFFFF - MASK)).to(tl.float32, bitcast=True)
    normal = tl.where(is_finite(x), rounded, x)
    if MIN_EXPONENT <= -126:
        return normal
    SMALLEST_NORMAL: tl.constexpr = 2.0**MIN_EXPONENT
    SPACING: tl.constexpr = 2.0 ** (MIN_EXPONENT - MANTISSA)
    UNITS: tl.constexpr = 2.0 ** (MANTISSA - MIN_EXPONENT)
    uniform = (bits & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    subnormal = tl.floor(x * UNITS + uniform) * SPACING
    return tl.where((tl.abs(x) < SMALLEST_NORMAL) & (x != 0), subnormal, normal)
