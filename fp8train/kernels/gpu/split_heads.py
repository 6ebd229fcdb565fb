"""Launcher of :mod:`fp8train.kernels.split_heads`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.elementwise import round_like
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.split_heads import _split_heads_fake

_TOKENS = 16


@triton.jit
def _split_kernel(
    qkv,
    cos,
    sin,
    query,
    key,
    value,
    tokens,
    length,
    groups,
    per_group,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROTATES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program copies one head of ``TOKENS`` tokens; heads are numbered as they lie in the projection."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    group, place = head // per_group, head % per_group
    here = (token < tokens)[:, None]
    column = tl.arange(0, HALF)
    source = (token[:, None] * groups * per_group + head) * DIM + column[None, :]
    first = tl.load(qkv + source, mask=here, other=0.0)
    second = tl.load(qkv + source + HALF, mask=here, other=0.0)
    if ROTATES:
        at = (token % length)[:, None] * HALF + column[None, :]
        c = tl.load(cos + at, mask=here, other=0.0)
        s = tl.load(sin + at, mask=here, other=0.0)
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        turned_first = round_like(wide_first * c - wide_second * s, qkv, HARDWARE)
        turned_second = round_like(wide_second * c + wide_first * s, qkv, HARDWARE)
        turns = place < per_group - 1  # values do not
        first = tl.where(turns, turned_first.to(first.dtype), first)
        second = tl.where(turns, turned_second.to(second.dtype), second)
    queries = per_group - 2
    if place < queries:
        target = (token[:, None] * groups * queries + group * queries + place) * DIM + column[None, :]
        tl.store(query + target, first, mask=here)
        tl.store(query + target + HALF, second, mask=here)
    else:
        target = (token[:, None] * groups + group) * DIM + column[None, :]
        if place == queries:
            tl.store(key + target, first, mask=here)
            tl.store(key + target + HALF, second, mask=here)
        else:
            tl.store(value + target, first, mask=here)
            tl.store(value + target + HALF, second, mask=here)


def split_heads(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fp8train.kernels.split_heads.split_heads`: one read, one write."""
    assert qkv.is_contiguous() and head_dim & (head_dim - 1) == 0, (qkv.stride(), head_dim)
    parts = _split_heads_fake(qkv, cos, sin, num_kv_heads, head_dim)
    batch, length, width = qkv.shape
    heads, rotates = width // head_dim, cos is not None and sin is not None
    launch(
        _split_kernel,
        (triton.cdiv(batch * length, _TOKENS), heads),
        qkv,
        cos if rotates else qkv,
        sin if rotates else qkv,
        *parts,
        batch * length,
        length,
        num_kv_heads,
        heads // num_kv_heads,
        TOKENS=_TOKENS,
        DIM=head_dim,
        HALF=head_dim // 2,
        ROTATES=rotates,
        HARDWARE=hardware(),
        num_warps=4,
    )
    return parts
