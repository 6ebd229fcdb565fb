"""Launchers of :mod:`fp8train.kernels.rotary`: a program has both halves of the heads that it turns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.elementwise import Tiles, first_of_pair, launchers, round_like
from fp8train.kernels.gpu.launch import hardware, launch

_TILE = 64


@triton.jit
def _rotate_kernel(
    qkv,
    cos,
    sin,
    height,
    width,
    length,
    pairs,
    QUERIES: tl.constexpr,
    UNIT: tl.constexpr,
    HARDWARE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    turning = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)  # pairs of queries and keys alone
    inside = (row < height)[:, None] & (turning < pairs)[None, :]
    # A group's turning heads are followed by its value.
    TURNING: tl.constexpr = (QUERIES + 1) * UNIT
    column = turning + turning // TURNING * UNIT
    at = qkv + row[:, None] * width + first_of_pair(column, UNIT)[None, :]
    angle = (row % length)[:, None] * UNIT + (column % UNIT)[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + UNIT, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, round_like(first * c - second * s, qkv, HARDWARE), mask=inside)
    tl.store(at + UNIT, round_like(second * c + first * s, qkv, HARDWARE), mask=inside)


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, head_dim: int) -> None:
    """:func:`fp8train.kernels.rotary.rotate_heads_`: values are neither read nor written."""
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    batch, length, width = qkv.shape
    queries = width // (num_kv_heads * head_dim) - 2
    pairs = num_kv_heads * (queries + 1) * (head_dim // 2)
    launch(
        _rotate_kernel,
        (triton.cdiv(batch * length, _TILE), triton.cdiv(pairs, _TILE)),
        qkv,
        cos,
        sin,
        batch * length,
        width,
        length,
        pairs,
        QUERIES=queries,
        UNIT=head_dim // 2,
        HARDWARE=hardware(),
        TILE_M=_TILE,
        TILE_K=_TILE,
        num_warps=8,
    )


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
