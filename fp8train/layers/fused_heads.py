"""Residual sum, norm, projection to heads, and RoPE as one autograd function, for GPUs.

What :mod:`fp8train.layers.fused_mlp` is to the second half of a block, for the first: from the stream to
queries, keys and values. Attention and its output projection follow as they are. Backward rotates the
gradients of queries and keys back while it casts the projection's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.rotary import heads_grad, split_heads
from fp8train.layers.fused_linear import FusedLinear, Source
from fp8train.layers.fused_norm import FusedNorm
from fp8train.layers.gradient_amax import GradientAmax

Operands = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


@dataclass(frozen=True)
class FusedHeads:
    """What the function depends on besides tensors; ``batch`` sequences, heads of ``head_dim``;
    ``delta_amax``: of the gradient of the branch that joins, if one does."""

    norm: FusedNorm
    qkv: FusedLinear
    batch: int
    num_kv_heads: int
    head_dim: int
    delta_amax: GradientAmax | None


class _FusedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        operands: Operands,
        parts: FusedHeads,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        normed, source = parts.norm.forward(x, delta, norm_weight, norm_bias)
        qkv, kept = parts.qkv.forward(source, operands[:2])
        qkv = qkv.contiguous().view(parts.batch, -1, qkv.shape[1])
        query, key, value = split_heads(
            qkv, cos, sin, num_kv_heads=parts.num_kv_heads, head_dim=parts.head_dim
        )
        ctx.save_for_backward(
            normed.stream,
            normed.mean,
            normed.rstd,
            norm_weight,
            norm_bias,
            cos,
            sin,
            *kept,
            *operands[2:],
        )
        ctx.parts = parts
        return normed.stream, query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_stream, *grad_heads = grads
        stream, mean, rstd, norm_weight, norm_bias, cos, sin, *rest = ctx.saved_tensors
        parts: FusedHeads = ctx.parts
        gradient = Source.of_formula(heads_grad, *grad_heads, cos, sin, rows=len(stream))
        grad_n, grad_weight = parts.qkv.backward(
            gradient,
            (rest[0], rest[1]),
            (rest[2], rest[3]),
            lambda: parts.norm.again(stream, mean, rstd, norm_weight, norm_bias),
        )
        grad_x, grad_norm, grad_bias = parts.norm.backward(
            grad_n, grad_stream, stream, mean, rstd, norm_weight, norm_bias, parts.delta_amax
        )
        grad_delta = grad_x if ctx.needs_input_grad[1] else None
        return grad_x, grad_delta, grad_norm, grad_bias, grad_weight, None, None, None, None


def fused_heads(
    x: Tensor,
    delta: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    tables: tuple[Tensor | None, Tensor | None],
    operands: Operands,
    parts: FusedHeads,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``stream = x + delta``, and the heads of ``norm(stream)``.

    Args:
        x: residual stream [B·S, H].
        delta: the branch that is to join it, likewise; None: it has joined.
        norm: weight and bias of the norm.
        weight: of the projection, for autograd to tell where its gradient belongs.
        tables: FP32 cos and sin [S, D/2]; None leaves positions out.
        operands: the projection's :meth:`~fp8train.layers.linear.Linear.fused_weights`.
        parts: the rest.

    Returns:
        The stream [B·S, H], queries [B, G·P, S, D], keys and values [B, G, S, D].
    """
    return _FusedHeads.apply(x, delta, *norm, weight, *tables, operands, parts)
