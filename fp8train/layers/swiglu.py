"""SwiGLU's non-linearity ``silu(gate) · up`` on the fused projection, gate and up interleaved in units.

Written with autograd's own operations, backward would keep ``silu(gate)`` beside the projection's output,
and build the gradient of each half in a tensor of full width, to add the two. This function keeps the
projection's output alone (2·F values a token instead of 3·F) and writes both halves of the gradient in place.
``silu(gate)`` is computed again in backward and rounded as in forward, so the values are autograd's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.activations import halves, silu, silu_backward
from fp8train.layers.factors import Factors, scale
from fp8train.layers.row_chunks import row_chunks

_NONE = Factors()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, unit: int, mult: float, factors: Factors) -> Tensor:
        activated = fused.new_empty(fused.shape[0], fused.shape[1] // 2)
        for rows in row_chunks(fused.shape[0], fused.shape[1], fused.device):
            gate, up = halves(fused[rows], unit)
            target = activated[rows].unflatten(-1, (-1, unit))
            torch.mul(silu(gate, mult), up, out=target)
            if factors.output != 1.0:
                target.mul_(factors.output)
        ctx.save_for_backward(fused)
        ctx.unit, ctx.mult, ctx.grad_factor = unit, mult, factors.grad
        return activated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (fused,) = ctx.saved_tensors
        grad_fused = torch.empty_like(fused)
        for rows in row_chunks(fused.shape[0], fused.shape[1], fused.device):
            gate, up = halves(fused[rows], ctx.unit)
            grad_gate, grad_up = halves(grad_fused[rows], ctx.unit)
            grad = grads[0][rows].unflatten(-1, (-1, ctx.unit))
            if ctx.grad_factor != 1.0:
                grad = grad * ctx.grad_factor
            torch.mul(grad, silu(gate, ctx.mult), out=grad_up)
            silu_backward(grad * up, gate, ctx.mult, out=grad_gate)
        return grad_fused, None, None, None


def swiglu(fused: Tensor, *, unit: int, mult: float = 1.0, factors: Factors = _NONE) -> Tensor:
    """SwiGLU on the fused projection: ``silu(mult·gate)/mult · up``, times ``factors.output``.

    Args:
        fused: [.., 2·F]: units of ``unit`` gate columns followed by as many up columns.
        unit: divides F.
        mult: factor inside the non-linearity.
        factors: on the result, and on the gradient.

    Returns:
        [.., F] in fused's dtype.
    """
    if torch.compiler.is_compiling():  # the compiler fuses, and decides itself what to keep
        gate, up = halves(fused, unit)
        activated = F.silu(gate) if mult == 1.0 else F.silu(gate * mult) * (1 / mult)
        return scale((activated * up).flatten(-2), factors)
    flat = fused.reshape(-1, fused.shape[-1])
    return _SwiGLU.apply(flat, unit, mult, factors).view(*fused.shape[:-1], fused.shape[-1] // 2)
