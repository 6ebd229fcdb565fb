"""Sums of FP8 payloads as a native FP8 all-reduce makes them: every addition rounds to FP8.

NCCL (and the fork that FP8-LM trained with) adds two codes as ``fp8(half(a) + half(b))`` wherever two
partial sums meet. FP16 is wide enough for this to be the exact sum, rounded once. The conversion saturates,
so an overflow is silent: ±max, no infinity and no NaN. A payload that meets N - 1 others in a row is rounded
N - 1 times (*ring*), about log2 N times in a *tree*, and once if a switch or a symmetric kernel adds in
higher precision (*wide*, NVLS-like). The error follows from that number: for a ring of 64 ranks it is so
large that no scale repairs it.

The ``fold_*`` functions simulate N ranks in one process, on a stack of payloads [N, n], for any N;
:mod:`fp8train.comm.fp8_all_reduce` does the same over a process group.

A payload of n codes is cut into N chunks of ``ceil(n / N)`` (zeros follow the last); rank c owns chunk c.

* Ring: chunk c starts at rank c + 1 and passes c + 2, c + 3, ... until its owner adds the last term.
* Tree: chunk c is summed over the ranks c, c + 1, ..., c - 1, in this order, by a balanced binary tree whose
  root is c. Each rank is the root of one tree, so all of them send equally much.

These are the plain forms. NCCL's own rings and trees add in the same way, but their shape, and which element
lies in which chunk, depend on the topology and the size of the message.

Source: Peng et al. 2023, "FP8-LM", section 2.1 (sums of payloads that share a scale).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fp8train.numerics.formats import dtype_of, format_of
from fp8train.precision.number_formats import E4M3, E5M2, Format

MAX_CODE = {E4M3: 0x7E, E5M2: 0x7B}
"""Code of the largest finite value, sign bit clear."""

_NAN = 0x7F  # a NaN in both formats, and the one that the GPU's conversion produces


def add_fp8(a: Tensor, b: Tensor) -> Tensor:
    """``fp8(half(a) + half(b))``: added in FP16, rounded to nearest even, saturating.

    An infinity (E5M2 codes or an FP16 overflow) saturates too; a NaN in either operand, whatever its sign
    and code, gives the NaN 0x7F.

    Args:
        a: FP8 payload of any shape.
        b: of the same format and shape.

    Returns:
        Payload of the same format and shape.

    Raises:
        ValueError: not FP8, or two formats.
    """
    fmt = format_of(a.dtype)
    if b.dtype != a.dtype:
        raise ValueError(f"cannot add {b.dtype} to {a.dtype}: FP8 sums need one format")
    return add_codes(a.view(torch.uint8), b.view(torch.uint8), fmt).view(dtype_of(fmt))


def add_codes(a: Tensor, b: Tensor, fmt: Format) -> Tensor:
    """Add two FP8 payloads given as uint8 codes, as :func:`add_fp8` does; returns codes."""
    if a.device.type != "cpu":
        return _add_in_fp16(a, b, fmt)
    pairs = a.reshape(-1).to(torch.int32).mul_(256).add_(b.reshape(-1))  # a look-up is 10 times faster
    return _all_sums(fmt).index_select(0, pairs).view(a.shape)


def _add_in_fp16(a: Tensor, b: Tensor, fmt: Format) -> Tensor:
    total = a.view(dtype_of(fmt)).half() + b.view(dtype_of(fmt)).half()
    codes = total.clamp(-fmt.max, fmt.max).to(dtype_of(fmt)).view(torch.uint8)
    return torch.where(total.isnan(), _NAN, codes)


@cache
def _all_sums(fmt: Format) -> Tensor:
    """The sums of all pairs of codes: uint8 [256 · 256]."""
    code = torch.arange(256, dtype=torch.uint8, device="cpu")
    return _add_in_fp16(code.repeat_interleave(256), code.repeat(256), fmt)


def count_at_maximum(payload: Tensor) -> Tensor:
    """How many codes are ±max: int64 scalar on the payload's device, no host sync.

    After a saturating sum these are the entries that overflowed, and those that are that large rightly.
    """
    magnitude = payload.view(torch.uint8) & 0x7F
    return torch.count_nonzero(magnitude == MAX_CODE[format_of(payload.dtype)])


def chunk_length(numel: int, size: int) -> int:
    """Codes of one rank's chunk when ``numel`` codes are shared by ``size`` ranks: at least 1."""
    return max(1, -(-numel // size))


def as_chunks(payload: Tensor, size: int) -> Tensor:
    """Flat payload [.., n] as uint8 chunks [.., size, ceil(n / size)]; a view where ``size`` divides n."""
    codes = payload.view(torch.uint8)
    length = chunk_length(codes.shape[-1], size)
    short = size * length - codes.shape[-1]
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    return codes.unflatten(-1, (size, length))


def fold_ring(codes: Tensor) -> Tensor:
    """What a ring of N ranks gives. Args: FP8 payloads [N, n]. Returns: FP8 [n]."""
    fmt = format_of(codes.dtype)
    terms = _in_owner_order(codes, first=1)
    total = terms[0]
    for term in terms[1:]:
        total = add_codes(total, term, fmt)
    return total.flatten()[: codes.shape[1]].view(dtype_of(fmt))


def fold_tree(codes: Tensor) -> Tensor:
    """What balanced binary trees over N ranks give. Args: FP8 payloads [N, n]. Returns: FP8 [n]."""
    fmt = format_of(codes.dtype)
    partial = _in_owner_order(codes, first=0)
    while len(partial) > 1:
        pairs = len(partial) // 2
        sums = add_codes(partial[0 : 2 * pairs : 2], partial[1 : 2 * pairs : 2], fmt)
        partial = torch.cat([sums, partial[2 * pairs :]])  # an odd one waits for the next level
    return partial[0].flatten()[: codes.shape[1]].view(dtype_of(fmt))


def fold_wide(codes: Tensor, *, accumulate: torch.dtype = torch.float32) -> Tensor:
    """Added in rank order in ``accumulate``, rounded to FP8 once.

    Args:
        codes: FP8 payloads [N, n].
        accumulate: FP32 (NCCL's symmetric kernels) or FP16 (in-switch sums).

    Returns:
        FP8 [n], saturated.
    """
    fmt = format_of(codes.dtype)
    total = codes[0].to(accumulate)
    for term in codes[1:]:
        total = total + term.to(accumulate)
    return total.clamp(-fmt.max, fmt.max).to(dtype_of(fmt))


def _in_owner_order(codes: Tensor, *, first: int) -> Tensor:
    """Codes of N ranks with ``result[p, c]`` = chunk c of rank c + first + p: uint8 [N, N, length]."""
    chunks = as_chunks(codes, len(codes))
    rank = torch.arange(len(codes), device=codes.device)
    return chunks[(rank[:, None] + rank + first) % len(codes), rank]
