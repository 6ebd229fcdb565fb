"""Multipliers around an operation: one for its output, another for the gradients of its inputs.

Unit scaling (Blake et al. 2023) replaces an operation ``y = f(x)`` by ``y = α·f(x)`` with the backward
``grad_x = β·f'(x)ᵀ grad_y``, so that activations and gradients keep unit variance without measuring them.
With ``α = β`` that is the true gradient of ``α·f``; with ``α ≠ β`` it is not, which is harmless only where no
other path leads around the operation (a cut edge of the graph: weights, the output head), because there β
multiplies the whole gradient of whatever lies behind it.

A multiplication by 1 is left out, so the standard parametrisation computes what it always did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """Multipliers of one operation: α (``output``) of its result, β (``grad``) of the gradients of its
    inputs."""

    output: float = 1.0
    grad: float = 1.0


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_factor = backward
        return x.view_as(x) if forward == 1.0 else x * forward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad if ctx.backward_factor == 1.0 else grad * ctx.backward_factor, None, None


def scale(x: Tensor, factors: Factors) -> Tensor:
    """``output · x``, whose backward multiplies by ``grad``. Any shape and float dtype."""
    if factors.output == factors.grad:
        return x if factors.output == 1.0 else x * factors.output
    return _Scale.apply(x, factors.output, factors.grad)


def scale_backward(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` itself, whose gradient is multiplied by ``factor``."""
    return scale(x, Factors(1.0, factor))


def scale_forward(x: Tensor, factor: float) -> Tensor:
    """Return ``factor · x``, whose gradient passes unchanged."""
    return scale(x, Factors(factor, 1.0))
