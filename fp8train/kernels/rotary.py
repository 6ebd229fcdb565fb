"""Rotary position embedding on the fused projection of queries, keys and values, and back.

The projection's output is [B, S, G·(P+2)·D]: for each of G key/value groups P query heads, their key, their
value. Attention kernels want heads at one stride, which queries of several groups have not: forward writes
all three to memory of their own, rotated, and the projection's output is free at once. Backward turns their
gradients into the gradient of the projection's output in one pass, with or without a cast for the GEMMs that
read it.

Pairs are (i, i + D/2), as in Llama's published weights (:mod:`fp8train.layers.rotary` makes the table). The
rotation is done in the table's precision, then rounded: a cosine rounded to BF16 shifts relative positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.kernels.tiled import TiledValues


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of every head by its position's angle.

    Args:
        x: [B, heads, S, D].
        cos: [S, D/2], FP32 or wider.
        sin: the same.

    Returns:
        [B, heads, S, D] in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _split_heads(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = qkv.view(*qkv.shape[:2], num_kv_heads, qkv.shape[2] // (num_kv_heads * head_dim), head_dim)
    query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    if cos is not None and sin is not None:
        query, key = (apply_rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (query, key))
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (query, key, value))  # type: ignore[return-value]


def split_heads_fake(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for :func:`split_heads`: [B, S, heads, D] of queries, keys and values."""
    batch, length, width = qkv.shape
    queries = width // head_dim - 2 * num_kv_heads
    return (
        qkv.new_empty(batch, length, queries, head_dim),
        qkv.new_empty(batch, length, num_kv_heads, head_dim),
        qkv.new_empty(batch, length, num_kv_heads, head_dim),
    )


_split_op = FusedOp(
    _split_heads,
    launcher="fp8train.kernels.gpu.rotary:split_heads",
    fake=split_heads_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:3]), nbytes(*out)),
)


def split_heads(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the fused projection into heads and rotate queries and keys.

    Args:
        qkv: [B, S, G·(P+2)·D], contiguous.
        cos: FP32 [S, D/2], contiguous; None leaves positions out.
        sin: the same.
        num_kv_heads: G.
        head_dim: D.

    Returns:
        Queries [B, G·P, S, D], keys and values [B, G, S, D], heads innermost but one in memory.
    """
    parts = _split_op(qkv, cos, sin, num_kv_heads, head_dim)
    query, key, value = (part.transpose(1, 2) for part in parts)
    return query, key, value


def _heads_grad(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    if cos is not None and sin is not None:
        grad_query, grad_key = (apply_rotary(grad, cos, -sin) for grad in (grad_query, grad_key))
    groups, width = grad_key.shape[1], grad_query.shape[-1]
    query = grad_query.unflatten(1, (groups, -1))
    whole = torch.cat((query, grad_key[:, :, None], grad_value[:, :, None]), dim=2)  # [B, G, P+2, S, D]
    return whole.flatten(1, 2).transpose(1, 2).reshape(-1, whole.shape[1] * whole.shape[2] * width)


def _grad_shape(grad_query: Tensor, grad_key: Tensor, *_: Any) -> tuple[int, int]:
    batch, heads, length, width = grad_query.shape
    return batch * length, (heads + 2 * grad_key.shape[1]) * width


heads_grad = TiledValues(_heads_grad, shape=_grad_shape, launchers="fp8train.kernels.gpu.rotary")
"""``(grad_query [B, G·P, S, D], grad_key, grad_value [B, G, S, D], cos, sin)`` -> gradient of the
projection's output [B·S, G·(P+2)·D]: queries and keys rotated back. Any strides; cos and sin FP32 [S, D/2],
or None for heads that were not rotated."""
