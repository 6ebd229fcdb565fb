"""From the fused projection to queries, keys and values, rotated, in one pass.

The projection's output is [B, S, G·(P+2)·D]: for each of G key/value groups P query heads, their key, their
value. Attention kernels want heads at one stride, which queries of several groups have not: so all three
are written to memory of their own, [B, S, heads, D], and the projection's output is free at once. The way
back is :data:`fp8train.kernels.rotary.heads_grad`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of every head by its position's angle: x [B, S, heads, D], cos and sin
    [S, D/2] in at least FP32; rounded once."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = (first * cos).sub_(second * sin), (second * cos).add_(first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _split_heads(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = qkv.view(*qkv.shape[:2], num_kv_heads, -1, head_dim)
    query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    if cos is not None and sin is not None:
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (query, key, value))  # type: ignore[return-value]


def _split_heads_fake(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv.shape
    queries = width // head_dim - 2 * num_kv_heads
    return (
        qkv.new_empty(batch, length, queries, head_dim),
        qkv.new_empty(batch, length, num_kv_heads, head_dim),
        qkv.new_empty(batch, length, num_kv_heads, head_dim),
    )


_split_op = FusedOp(
    _split_heads,
    launcher="fp8train.kernels.gpu.split_heads:split_heads",
    fake=_split_heads_fake,
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
        head_dim: D, a power of two for the launcher.

    Returns:
        Queries [B, G·P, S, D], keys and values [B, G, S, D], heads innermost but one in memory.
    """
    parts = _split_op(qkv, cos, sin, num_kv_heads, head_dim)
    query, key, value = (part.transpose(1, 2) for part in parts)
    return query, key, value
