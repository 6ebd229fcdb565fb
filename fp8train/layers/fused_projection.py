"""A linear alone as an autograd function of the parts of fused ones, for GPUs: attention's output projection.

Its codes are those of :class:`~fp8train.layers.linear.Linear`. What it adds is the way to its gradient's
amax, which the backward of the norm behind it has found (:mod:`fp8train.layers.gradient_amax`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.layers.fused_linear import FusedLinear, Source
from fp8train.layers.gradient_amax import GradientAmax


@dataclass(frozen=True)
class FusedProjection:
    """What the function depends on besides tensors; ``out_amax``: of the gradient of its result."""

    linear: FusedLinear
    out_amax: GradientAmax


class _FusedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        operands: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        parts: FusedProjection,
    ) -> Tensor:
        out, kept = parts.linear.forward(Source.of_values(x), operands[:2])
        ctx.save_for_backward(*kept, *operands[2:])
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale_inv, w, w_scale_inv = ctx.saved_tensors
        parts: FusedProjection = ctx.parts
        gradient = Source.of_values(grads[0], parts.out_amax.take(grads[0]))
        grad_x, grad_weight = parts.linear.backward(
            gradient, (x, x_scale_inv), (w, w_scale_inv), lambda: Source.of_values(x)
        )
        return grad_x, grad_weight, None, None


def fused_projection(
    x: Tensor,
    weight: Tensor,
    operands: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    parts: FusedProjection,
) -> Tensor:
    """``x @ weight.T``: [T, K] -> [T, N].

    Args:
        x: the input.
        weight: for autograd to tell where its gradient belongs.
        operands: its :meth:`~fp8train.layers.linear.Linear.fused_weights`.
        parts: the rest.
    """
    return _FusedProjection.apply(x, weight, operands, parts)
