"""Launchers of :mod:`fp8train.kernels.rotary`: a program has both halves of the heads that it turns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.elementwise import Tiles, launchers, round_like
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.rotary import split_heads_fake

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
    LANES: tl.constexpr,
    ROTATES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program copies one head of ``TOKENS`` tokens; heads are numbered as they lie in the projection."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    group, place = head // per_group, head % per_group
    column = tl.arange(0, LANES)
    here = (token < tokens)[:, None] & (column < HALF)[None, :]
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
    """:func:`fp8train.kernels.rotary.split_heads`: one read, one write."""
    assert qkv.is_contiguous(), f"strides {qkv.stride()}"
    parts = split_heads_fake(qkv, cos, sin, num_kv_heads, head_dim)
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
        LANES=triton.next_power_of_2(head_dim // 2),
        ROTATES=rotates,
        HARDWARE=hardware(),
        num_warps=4,
    )
    return parts


@triton.jit
def _load_pair(x, strides, sample, position, head, pair, chosen, UNIT: tl.constexpr):
    """Both halves, FP32, of heads of a tensor [B, heads, S, D] with these strides."""
    at = x + (sample * strides[0] + position * strides[2])[:, None]
    at += (head * strides[1] + pair * strides[3])[None, :]
    first = tl.load(at, mask=chosen, other=0.0).to(tl.float32)
    return first, tl.load(at + UNIT * strides[3], mask=chosen, other=0.0).to(tl.float32)


@triton.jit
def _heads_grad_values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    query, key, value, query_strides, key_strides, value_strides, cos, sin, length = inputs
    QUERIES: tl.constexpr = OPTION[0]
    UNIT: tl.constexpr = OPTION[1]
    sample, position = row // length, row % length
    head, pair = column // UNIT, column % UNIT
    group, place = head // (QUERIES + 2), head % (QUERIES + 2)
    is_query, is_key = (place < QUERIES)[None, :], (place == QUERIES)[None, :]
    turned = inside & (is_query | is_key)
    where = (sample, position)
    q1, q2 = _load_pair(query, query_strides, *where, group * QUERIES + place, pair, inside & is_query, UNIT)
    k1, k2 = _load_pair(key, key_strides, *where, group, pair, inside & is_key, UNIT)
    v1, v2 = _load_pair(value, value_strides, *where, group, pair, inside & (place > QUERIES)[None, :], UNIT)
    first = tl.where(is_query, q1, tl.where(is_key, k1, v1))
    second = tl.where(is_query, q2, tl.where(is_key, k2, v2))
    if cos is not None:
        angle = position[:, None] * UNIT + pair[None, :]
        c = tl.load(cos + angle, mask=turned, other=1.0)
        s = tl.load(sin + angle, mask=turned, other=0.0)
        one = round_like(first * c + second * s, query, HARDWARE)
        two = round_like(second * c - first * s, query, HARDWARE)
        first, second = tl.where(turned, one, first), tl.where(turned, two, second)
    return first, second


def _heads_grad(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tiles:
    assert cos is None or sin is None or (cos.is_contiguous() and sin.is_contiguous())
    batch, heads, length, head_dim = grad_query.shape
    groups, unit = grad_key.shape[1], head_dim // 2
    gradients = (grad_query, grad_key, grad_value)
    inputs = (*gradients, *(grad.stride() for grad in gradients), cos, sin, length)
    shape = (batch * length, (heads + 2 * groups) * head_dim)
    return Tiles(_heads_grad_values, inputs, grad_query, shape, unit, option=(heads // groups, unit))


heads_grad_forward, heads_grad_amax, heads_grad_cast = launchers(_heads_grad)
