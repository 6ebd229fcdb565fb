"""Residual sum, norm and feed-forward network as one autograd function, for GPUs.

Between its GEMMs a block only reads and writes memory. Separate layers write each result in BF16, and each
cast reads it twice: once for the amax, once to cast. Here every formula is computed while its operand is
cast::

    forward   stream = x + delta;  n = norm(stream), cast            2 passes
              up = n · W_upᵀ                                         GEMM
              h = activation(up), amax and cast                      2 passes over up
              out = h · W_downᵀ                                      GEMM
    backward  g cast;  grad_h = g · W_down;  W_down's gradient       1 pass, 2 GEMMs
              grad_up = activation'(up) · grad_h, amax and cast      2 passes over both
              grad_n = grad_up · W_up;  W_up's gradient              2 GEMMs
              grad_stream from grad_n and what reaches the stream    1 pass

The amax of g was found by the norm's backward that wrote it, the next block's.

Backward keeps the stream, the codes of n and h, and ``up`` in BF16. Values and codes are those of the layers
one by one. Without FP8 the same function keeps n and h in BF16 instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.layers.fused_activation import FusedActivation
from fp8train.layers.fused_linear import FusedLinear, Source
from fp8train.layers.fused_norm import FusedNorm
from fp8train.layers.gradient_amax import GradientAmax


@dataclass(frozen=True)
class FusedMlp:
    """What the function depends on besides tensors; ``delta_amax`` and ``out_amax``: of the gradients of the
    branch that joins and of the result."""

    norm: FusedNorm
    up: FusedLinear
    activation: FusedActivation
    down: FusedLinear
    delta_amax: GradientAmax
    out_amax: GradientAmax


class _FusedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        up_weight: Tensor,
        down_weight: Tensor,
        up_operands: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        down_operands: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        parts: FusedMlp,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        normed, source = parts.norm.forward(x, delta, norm_weight, norm_bias)
        up, kept_n = parts.up.forward(source, up_operands[:2])
        up = up.contiguous()
        out, kept_h = parts.down.forward(parts.activation.forward(up), down_operands[:2])
        ctx.save_for_backward(
            normed.stream,
            normed.mean,
            normed.rstd,
            norm_weight,
            norm_bias,
            up,
            *kept_n,
            *kept_h,
            *up_operands[2:],
            *down_operands[2:],
        )
        ctx.parts = parts
        return normed.stream, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_stream, grad_out = grads
        stream, mean, rstd, norm_weight, norm_bias, up, *rest = ctx.saved_tensors
        kept_n, kept_h, up_operand, down_operand = (tuple(rest[i : i + 2]) for i in (0, 2, 4, 6))
        parts: FusedMlp = ctx.parts
        assert grad_out is not None
        grad_h, grad_down = parts.down.backward(
            Source.of_values(grad_out, parts.out_amax.take(grad_out)),
            kept_h,
            down_operand,
            lambda: parts.activation.forward(up),
        )
        grad_n, grad_up = parts.up.backward(
            parts.activation.backward(up, grad_h),
            kept_n,
            up_operand,
            lambda: parts.norm.again(stream, mean, rstd, norm_weight, norm_bias),
        )
        grad_x, grad_norm, grad_bias = parts.norm.backward(
            grad_n, grad_stream, stream, mean, rstd, norm_weight, norm_bias, parts.delta_amax
        )
        grad_delta = grad_x if ctx.needs_input_grad[1] else None
        return grad_x, grad_delta, grad_norm, grad_bias, grad_up, grad_down, None, None, None


def fused_mlp(
    x: Tensor,
    delta: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None],
    weights: tuple[Tensor, Tensor],
    operands: tuple[tuple[Any, ...], tuple[Any, ...]],
    parts: FusedMlp,
) -> tuple[Tensor, Tensor]:
    """``stream = x + delta`` and ``mlp(norm(stream))``, not yet added to each other.

    Args:
        x: residual stream [T, H].
        delta: the branch that is to join it, likewise; None: it has joined.
        norm: weight and bias of the norm.
        weights: of the up and the down projection, for autograd to tell where gradients belong.
        operands: their :meth:`~fp8train.layers.linear.Linear.fused_weights`.
        parts: the rest.

    Returns:
        The stream and the MLP's output, [T, H] each.
    """
    return _FusedMlp.apply(x, delta, *norm, *weights, *operands, parts)
