"""Equations 3 to 6 of FP8-LM, the FP8 sums and the μ rule once more: NumPy, no torch, nothing of fp8train."""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tests.numerics.fp8_table import Table

Array = NDArray


@cache
def all_values(table: Table) -> Array:
    return np.array([table.decode(code) for code in range(256)])


def encode(x: Array, table: Table) -> Array:
    """Codes of FP64 values: to nearest, ties to the even code, clamped; NaN is 0x7F."""
    values = all_values(table)[:128]
    values = values[np.isfinite(values)]
    middle = (values[1:] + values[:-1]) / 2
    magnitude = np.minimum(np.abs(x), values[-1])
    code = np.searchsorted(middle, magnitude, side="left")  # a tie goes to the lower one ..
    tie = (code < len(middle)) & (np.append(middle, 0.0)[code] == magnitude)
    code = code + (tie & (code % 2 == 1))  # .. unless that is odd
    return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def decode(codes: Array, table: Table) -> Array:
    return all_values(table)[codes]


def add(a: Array, b: Array, table: Table) -> Array:
    """fp8(half(a) + half(b)): the exact sum in FP64, to FP16, to FP8."""
    with np.errstate(over="ignore", invalid="ignore"):
        return encode((decode(a, table) + decode(b, table)).astype(np.float16).astype(np.float64), table)


def all_reduce(codes: Array, table: Table, algorithm: str) -> Array:
    """The sum of [N, n] codes: each of N chunks in ring order, or by recursion over halves."""
    N, n = codes.shape
    length = -(-n // N)
    result = []
    for owner in range(N):
        part = codes[:, owner * length : (owner + 1) * length]
        if algorithm == "ring":
            total = part[(owner + 1) % N]
            for hop in range(2, N + 1):
                total = add(total, part[(owner + hop) % N], table)
        else:
            total = tree(part[[(owner + p) % N for p in range(N)]], table)
        result.append(total)
    return np.concatenate(result)


def tree(codes: Array, table: Table) -> Array:
    """The first 2^k of N terms and the rest, each by itself, then together."""
    if len(codes) == 1:
        return codes[0]
    half = 1 << (len(codes) - 1).bit_length() - 1
    return add(tree(codes[:half], table), tree(codes[half:], table), table)


def local_scale(g: Array, table: Table) -> float:
    """s_i: the largest power of two with amax · s <= max; no opinion on a tensor of zeros."""
    amax = float(np.abs(g).max())
    return 2.0 ** math.floor(math.log2(table.max / amax)) if amax > 0 else math.inf


def shared_scale(gradients: list[Array], mu: float, table: Table) -> tuple[Array, np.float32]:
    """Codes [N, n] of one tensor on N ranks, and the scale they share."""
    s_g = min(local_scale(g, table) for g in gradients)  # Eq. 4
    s = np.float32(s_g if math.isfinite(s_g) else 1.0) * np.float32(mu)  # Eq. 3 lives in the scale
    return np.stack([encode((g * s).astype(np.float64), table) for g in gradients]), s  # Eq. 5, FP32 product


def reduce_bucket(
    gradients: list[list[Array]], mus: list[float], table: Table, algorithm: str
) -> tuple[Array, list[np.float32]]:
    """Codes of the sum of a bucket, tensors end to end, and the scales. Args: FP32 [rank][tensor]."""
    tensors = [shared_scale([rank[t].ravel() for rank in gradients], mus[t], table) for t in range(len(mus))]
    return all_reduce(np.concatenate([codes for codes, _ in tensors], axis=1), table, algorithm), [
        s for _, s in tensors
    ]


def next_mu(mu: float, saturated: int, numel: int, world_size: int) -> float:
    """The rule of section 2.1 with bounds."""
    mu = mu / 2 if saturated / numel > 1e-5 else mu * 2 ** (1 / 1000)
    return min(1.0, max(1 / (2 * world_size), mu))
