"""Rotary position embedding on the fused projection of queries, keys and values, and back.

The projection's output is [B, S, G·(P+2)·D]: for each of G key/value groups P query heads, their key, their
value. Forward rotates queries and keys where they lie; attention reads all three as strided views. Backward
turns the gradients of the views into the gradient of the projection's output in one pass, with or without a
cast for the GEMMs that read it.

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


def _grouped(qkv: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """[B, S, G·(P+2)·D] as a view [B, S, G, P+2, D]."""
    return qkv.view(*qkv.shape[:2], num_kv_heads, -1, head_dim)


def _rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, head_dim: int) -> None:
    turning = _grouped(qkv, num_kv_heads, head_dim)[..., :-1, :]
    heads = turning.flatten(2, 3).transpose(1, 2)
    turning.copy_(apply_rotary(heads, cos, sin).transpose(1, 2).view(turning.shape))


def _rotate_cost(args: tuple[Any, ...], out: None) -> Cost:
    qkv, cos, sin, num_kv_heads, head_dim = args
    values = qkv[..., 0].numel() * num_kv_heads * head_dim * qkv.element_size()
    turning = nbytes(qkv) - values
    return Cost(1, turning + nbytes(cos, sin), turning)


_rotate_op = FusedOp(
    _rotate_heads,
    launcher="fp8train.kernels.gpu.rotary:rotate_heads",
    fake=lambda *args: None,
    cost=_rotate_cost,
    mutates=("qkv",),
)


def rotate_heads_(qkv: Tensor, cos: Tensor, sin: Tensor, *, num_kv_heads: int, head_dim: int) -> None:
    """Rotate queries and keys in place.

    Args:
        qkv: [B, S, G·(P+2)·D], contiguous; values keep theirs.
        cos: [S, D/2], FP32, contiguous.
        sin: the same.
        num_kv_heads: G.
        head_dim: D.
    """
    _rotate_op(qkv, cos, sin, num_kv_heads, head_dim)


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
