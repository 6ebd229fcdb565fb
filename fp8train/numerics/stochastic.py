"""Stochastic rounding from a counter: reproducible, and the same however a tensor is cut.

A value between two neighbours of the target format goes up with the probability of its distance from the
lower one, so the expected result is the value itself and updates smaller than half a unit are not lost but
accumulate on average. The random bits are a hash of (seed, step, tensor, *logical* element index): no
generator state exists, ranks that hold different parts of a tensor draw the bits that one process would,
and a resumed run draws them again.

The hash is the 32-bit finaliser of MurmurHash3 (Appleby, public domain constants) of the index, multiplied
and shifted by the key: it passes from the low bits of the index to all bits. Integer arithmetic that wraps,
equal on every device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import Format

_INT32 = 1 << 32


def stream_key(seed: int, step: int, name: str) -> int:
    """A 32-bit key for one tensor in one step: everything but the element index."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _signed(value: int) -> int:
    value %= _INT32
    return value - _INT32 if value >= _INT32 // 2 else value


def _mix_(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser on int32, in place; shifts are logical (the sign bits that >> drags in are
    masked)."""
    shifted = torch.empty_like(h)
    for bits, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        torch.bitwise_right_shift(h, bits, out=shifted)
        h.bitwise_xor_(shifted.bitwise_and_((1 << (32 - bits)) - 1))
        if factor is not None:
            h.mul_(_signed(factor))
    return h


def mix_bits(h: Tensor) -> Tensor:
    """A hash of each int32, for keys made of data; in place."""
    return _mix_(h.add_(_signed(0x9E3779B1)))


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Uniform 32-bit patterns of the elements ``start .. start + count`` of a tensor.

    Args:
        key: from :func:`stream_key`.
        start: logical index of the first element; indices are taken modulo 2^32.
        count: how many.

    Returns:
        int32 [count].
    """
    index = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(start))
    return _mix_(index.mul_(_signed(0x9E3779B1)).add_(_signed(key)))


def random_bits_at(key: int, index: Tensor) -> Tensor:
    """Uniform 32-bit patterns of the elements at these logical indices: int64 [n] -> int32 [n], the same bits
    that :func:`random_bits` gives them."""
    wrapped = (index & (_INT32 - 1)).to(torch.int32)
    return _mix_(wrapped.mul_(_signed(0x9E3779B1)).add_(_signed(key)))


def random_bits_in_rows(
    key: int, start: int, count: int, *, row: int, logical_row: int, offset: int, device: torch.device
) -> Tensor:
    """The bits of elements ``start .. start + count`` of a part of a logical tensor.

    Args:
        key: from :func:`stream_key`.
        start: first element, row-major within the part.
        count: how many.
        row: elements of a row of the part.
        logical_row: elements of a row of the logical tensor.
        offset: logical row-major index of the part's first element.
        device: of the result.

    Returns:
        int32 [count].
    """
    if row == logical_row:
        return random_bits(key, offset + start, count, device)
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return random_bits_at(key, index // row * logical_row + index % row + offset)


def _on_cpu(x: Tensor) -> bool:
    """Whether a look at the values costs less than handling cases that are not there: it does not wait for a
    device, and elementwise masks are the slowest of a CPU's kernels."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def round_mantissa(x: Tensor, drop_bits: int, bits: Tensor) -> Tensor:
    """Stochastically round FP32 to a mantissa that is ``drop_bits`` shorter; normal numbers only.

    Adds ``drop_bits`` random bits below the new last place and cuts. A carry into the exponent is right:
    the next number up is the next power of two. NaN and infinity pass unchanged.

    Args:
        x: FP32.
        drop_bits: 13 for FP16, 16 for BF16, 20 for E4M3, 21 for E5M2.
        bits: int32 random patterns of x's shape.

    Returns:
        FP32 whose low ``drop_bits`` bits are zero.
    """
    mask = (1 << drop_bits) - 1
    rounded = (bits & mask).add_(x.view(torch.int32)).bitwise_and_(~mask).view(torch.float32)
    if _on_cpu(x) and math.isfinite(x.sum()):
        return rounded
    return torch.where(torch.isfinite(x), rounded, x)


def round_stochastic(x: Tensor, mantissa_bits: int, min_exponent: int, bits: Tensor) -> Tensor:
    """Stochastically round FP32 to a format with subnormals.

    Args:
        x: FP32, within the format's range.
        mantissa_bits: of the format: 10 for FP16, 7 for BF16, 3 for E4M3, 2 for E5M2.
        min_exponent: of its smallest normal number: -14 for FP16, E5M2; -6 for E4M3; -126 for BF16.
        bits: int32 random patterns of x's shape.

    Returns:
        FP32 values that the format holds exactly.
    """
    normal = round_mantissa(x, 23 - mantissa_bits, bits)
    if min_exponent <= -126:
        return normal
    if _on_cpu(x) and x.abs().amin() >= 2.0**min_exponent:
        return normal
    below = (x.abs() < 2.0**min_exponent).logical_and_(x != 0)
    # Below the smallest normal number the spacing is constant: x / spacing, up with the fraction's
    # probability.
    spacing = 2.0 ** (min_exponent - mantissa_bits)
    uniform = (bits & 0xFFFFFF).float() * 2.0**-24
    subnormal = (x / spacing + uniform).floor() * spacing
    return torch.where(below, subnormal, normal)


def cast_stochastic(x: Tensor, fmt: Format, scale: Tensor, bits: Tensor) -> Tensor:
    """Cast to ``fmt`` with stochastic rounding: x times ``scale``, clamped to ±max, as in
    :func:`fp8train.numerics.cast.cast`. ``bits``: int32 of x's shape. Returns the payload in
    ``fmt.dtype``."""
    scaled = (x.float() * scale).clamp_(-fmt.max, fmt.max)
    rounded = round_stochastic(scaled, fmt.mantissa_bits, 1 - fmt.bias, bits)
    return rounded.clamp_(-fmt.max, fmt.max).to(dtype_of(fmt))
