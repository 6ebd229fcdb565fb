"""From the fused projection to rotated queries, keys and values, and back.

The projection's rows are ordered by key/value group: P query heads, their key, their value. With autograd's
own operations each of the three slices would build a gradient of full width and the three would be added;
this function writes each part of the gradient once. The rotation (see :mod:`fp8train.layers.rotary`) is
orthogonal, so its backward is the rotation by the opposite angle; only the table is kept for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels import fused_op, rotary
from fp8train.kernels.rotary import apply_rotary, heads_grad
from fp8train.layers.row_chunks import row_chunks

Heads = tuple[Tensor, Tensor, Tensor]
Norm = Callable[[Tensor], Tensor]


class _FusedSplitHeads(torch.autograd.Function):
    """qkv [B, S, G·(P+2)·D] -> q [B, G·P, S, D], k and v [B, G, S, D], one launch each way, for GPUs."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_kv_heads: int, head_dim: int
    ) -> Heads:
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        return rotary.split_heads(qkv, cos, sin, num_kv_heads=num_kv_heads, head_dim=head_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return heads_grad.forward(*grads, *ctx.saved_tensors).view(ctx.shape), None, None, None, None


class _SplitHeads(torch.autograd.Function):
    """qkv [B, S, G, P+2, D] -> (q [B, S, G, P, D], k [B, S, G, D], v [B, S, G, D])."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Heads:
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        query, key, value = _parts(qkv)
        if cos is None or sin is None:
            return query, key, value
        turned = query.new_empty(query.shape), key.new_empty(key.shape)
        for source, target in zip((query, key), turned, strict=True):
            _rotate(source, cos, sin, target)
        return *turned, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_qkv = grads[0].new_empty(ctx.shape)
        query, key, value = _parts(grad_qkv)
        for grad, target in zip(grads, (query, key), strict=False):
            if cos is None:
                target.copy_(grad)
            else:
                _rotate(grad, cos, -sin, target)
        value.copy_(grads[2])
        return grad_qkv, None, None


def _parts(qkv: Tensor) -> Heads:
    """Views of [B, S, G, P+2, D]: queries [B, S, G, P, D], keys and values [B, S, G, D]."""
    return qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]


def _rotate(source: Tensor, cos: Tensor, sin: Tensor, target: Tensor) -> None:
    """Write ``source`` [B, S, .., D], rotated, to ``target``; cos/sin [S, D/2]."""
    batch, length, width = source.shape[0], source.shape[1], source[0, 0].numel()
    cos, sin = (table.view(length, *[1] * (source.dim() - 3), -1) for table in (cos, sin))
    samples = [slice(i, i + 1) for i in range(batch)] if source.device.type == "cpu" else [slice(None)]
    for sample in samples:
        for rows in row_chunks(length, width, source.device):
            first, second = source[sample, rows].to(cos.dtype).chunk(2, dim=-1)
            target_first, target_second = target[sample, rows].chunk(2, dim=-1)
            target_first.copy_((first * cos[rows]).sub_(second * sin[rows]))
            target_second.copy_((second * cos[rows]).add_(first * sin[rows]))


def split_heads(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_kv_heads: int,
    head_dim: int,
    norms: tuple[Norm, Norm] | None = None,
) -> Heads:
    """Cut the fused projection into heads, normalise queries and keys, and rotate them.

    Args:
        qkv: [B, S, G·(P+2)·D], G = num_kv_heads groups of P query heads, a key and a value of D = head_dim.
        cos: [S, D/2], FP32 or wider; None leaves positions out.
        sin: the same.
        num_kv_heads: G.
        head_dim: D.
        norms: of query and of key heads, each over D; None leaves them as they are.

    Returns:
        Queries [B, G·P, S, D], keys and values [B, G, S, D] in qkv's dtype; any strides.
    """
    if norms is None and fused_op.fuses_now(qkv):
        return _FusedSplitHeads.apply(qkv.contiguous(), cos, sin, num_kv_heads, head_dim)
    grouped = qkv.view(*qkv.shape[:2], num_kv_heads, -1, head_dim)
    if torch.compiler.is_compiling() or norms is not None:  # the compiler fuses, forward and backward
        query, key, value = _parts(grouped)
        if norms is not None:
            query, key = norms[0](query), norms[1](key)
        if cos is not None and sin is not None:
            query, key = query.flatten(2, 3).transpose(1, 2), key.transpose(1, 2)
            return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value.transpose(1, 2)
    else:
        query, key, value = _SplitHeads.apply(grouped, cos, sin)
    return query.flatten(2, 3).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
