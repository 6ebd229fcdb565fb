"""SwiGLU and GELU, forward and backward, with or without an FP8 cast of the result in the same pass.

With m = ``mult`` and α = ``output``, the non-linearity is ``α·f(m·x)/m``. Gradients are multiplied by
β = ``grad_factor``, which is α for a true gradient (:mod:`fp8train.layers.factors`)::

    swiglu       h = α · silu(m·gate)/m · up
    its gradient grad_up = β·g · silu(m·gate)/m;  grad_gate = β·g · up · silu'(m·gate)
    gelu         h = α · gelu(m·x)/m
    its gradient grad_x = β·g · gelu'(m·x)

Each product is rounded to the inputs' dtype, as a chain of torch's operations rounds it. Gate and up lie in
one matrix [T, 2·F], in units: ``unit`` gate columns, then as many up columns. Both gradients need gate, up
and g, so a GPU computes both from one read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.tiled import TiledValues


def halves(fused: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """(gate, up) of [.., 2·F] as views [.., F / unit, unit]."""
    units = fused.unflatten(-1, (-1, 2, unit))
    return units[..., 0, :], units[..., 1, :]


def silu(gate: Tensor, mult: float) -> Tensor:
    """``silu(mult · gate) / mult``."""
    return F.silu(gate) if mult == 1.0 else F.silu(gate * mult).mul_(1 / mult)


def silu_backward(grad: Tensor, gate: Tensor, mult: float, *, out: Tensor) -> None:
    """Write ``grad · silu'(mult · gate)`` to ``out``: the derivative of ``silu(m·x)/m`` is ``silu'(m·x)``."""
    inner = gate if mult == 1.0 else gate * mult
    torch.ops.aten.silu_backward.grad_input(grad, inner, grad_input=out)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor


def _swiglu(fused: Tensor, unit: int, mult: float, output: float) -> Tensor:
    gate, up = halves(fused, unit)
    return _scaled(silu(gate, mult) * up, output).flatten(1)


def _swiglu_grad(fused: Tensor, grad: Tensor, unit: int, mult: float, grad_factor: float) -> Tensor:
    grad_fused = torch.empty_like(fused)
    gate, up = halves(fused, unit)
    grad_gate, grad_up = halves(grad_fused, unit)
    grad = _scaled(grad, grad_factor).unflatten(-1, (-1, unit))
    torch.mul(grad, silu(gate, mult), out=grad_up)
    silu_backward(grad * up, gate, mult, out=grad_gate)
    return grad_fused


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def _gelu(x: Tensor, tanh: bool, mult: float, output: float) -> Tensor:
    activated = F.gelu(_scaled(x, mult), approximate=_approximate(tanh))
    return _scaled(_scaled(activated, 1 / mult), output)


def _gelu_grad(x: Tensor, grad: Tensor, tanh: bool, mult: float, grad_factor: float) -> Tensor:
    grad = _scaled(_scaled(grad, grad_factor), 1 / mult)
    inner = torch.ops.aten.gelu_backward(grad, _scaled(x, mult), approximate=_approximate(tanh))
    return _scaled(inner, mult)


_GPU = "fp8train.kernels.gpu.activations"

swiglu = TiledValues(_swiglu, shape=lambda fused, *_: (fused.shape[0], fused.shape[1] // 2), launchers=_GPU)
"""``(fused [T, 2·F], unit, mult, output)`` -> h [T, F]."""

swiglu_grad = TiledValues(
    _swiglu_grad, shape=lambda fused, *_: tuple(fused.shape), launchers=_GPU, forward="swiglu_backward"
)
"""``(fused [T, 2·F], grad [T, F], unit, mult, grad_factor)`` -> gradient of fused [T, 2·F]."""

gelu = TiledValues(_gelu, shape=lambda x, *_: tuple(x.shape), launchers=_GPU)
"""``(x [T, F], tanh, mult, output)`` -> h [T, F]; ``tanh``: the approximation."""

gelu_grad = TiledValues(
    _gelu_grad, shape=lambda x, *_: tuple(x.shape), launchers=_GPU, forward="gelu_backward"
)
"""``(x [T, F], grad [T, F], tanh, mult, grad_factor)`` -> gradient of x [T, F]."""
