"""A non-linearity on a GPU: alone, one launch each way, or as a part of a fused function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.tiled import TiledValues
from fp8train.layers.fused_linear import Source


@dataclass(frozen=True)
class FusedActivation:
    """A non-linearity inside a fused function.

    Attributes:
        values: of the projection's output, followed by ``settings`` and ``output``.
        gradient: likewise with the gradient of the result after the projection's output, and ``grad``.
        settings: its numbers.
        output: factor on the result.
        grad: factor on the gradient.
    """

    values: TiledValues
    gradient: TiledValues
    settings: tuple[Any, ...]
    output: float
    grad: float

    def forward(self, up: Tensor) -> Source:
        """The activated values of ``up`` [T, F'], as a source."""
        return Source.of_formula(self.values, up, *self.settings, self.output, rows=len(up))

    def backward(self, up: Tensor, grad: Tensor) -> Source:
        """The gradient of ``up``, as a source."""
        grad = grad.contiguous()
        return Source.of_formula(self.gradient, up, grad, *self.settings, self.grad, rows=len(up))

    def __call__(self, up: Tensor) -> Tensor:
        """The activated values of ``up`` [.., F'], which backward keeps."""
        flat = _Activation.apply(up.reshape(-1, up.shape[-1]).contiguous(), self)
        return flat.view(*up.shape[:-1], flat.shape[-1])


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, activation: FusedActivation) -> Tensor:
        ctx.save_for_backward(up)
        ctx.activation = activation
        return activation.forward(up).forward()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (up,) = ctx.saved_tensors
        return ctx.activation.backward(up, grads[0]).forward(), None
