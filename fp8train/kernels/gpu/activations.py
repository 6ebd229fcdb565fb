"""Launchers of :mod:`fp8train.kernels.activations`: one read of each input, one write of each result.

Arithmetic bounds these kernels as much as memory, so ``exp``, ``erf`` and the division by ``1 + exp`` are a
GPU's own, in FP32 to 2 units in the last place: after rounding to BF16 few values differ from torch's, by one
unit. What follows is rounded as torch's chain rounds it. Factors of 1 are compiled away (``SCALED``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.elementwise import Tiles, first_of_pair, launchers, round_like


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _scaled(x, factor, like, SCALED: tl.constexpr, HARDWARE: tl.constexpr):
    """``x · factor``, rounded; x itself unless ``SCALED``."""
    if SCALED:
        return round_like(x * factor, like, HARDWARE)
    else:
        return x


@triton.jit
def _load(x, row, column, inside, width):
    """FP32 tile of a matrix of that width."""
    return tl.load(x + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _swiglu_values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    fused, width, mult, inverse, output = inputs
    UNIT: tl.constexpr = OPTION[0]
    SCALED: tl.constexpr = OPTION[1]
    first = first_of_pair(column, UNIT)
    gate, up = _load(fused, row, first, inside, width), _load(fused, row, first + UNIT, inside, width)
    inner = _scaled(gate, mult, fused, SCALED, HARDWARE)
    silu = _scaled(round_like(inner * _sigmoid(inner), fused, HARDWARE), inverse, fused, SCALED, HARDWARE)
    return _scaled(round_like(silu * up, fused, HARDWARE), output, fused, SCALED, HARDWARE)


@triton.jit
def _swiglu_grad_values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    fused, grad, width, mult, inverse, grad_factor = inputs
    UNIT: tl.constexpr = OPTION[0]
    SCALED: tl.constexpr = OPTION[1]
    first = first_of_pair(column, UNIT)
    gate, up = _load(fused, row, first, inside, width), _load(fused, row, first + UNIT, inside, width)
    g = _scaled(_load(grad, row, column, inside, width // 2), grad_factor, fused, SCALED, HARDWARE)
    inner = _scaled(gate, mult, fused, SCALED, HARDWARE)
    sigmoid = _sigmoid(inner)
    silu = _scaled(round_like(inner * sigmoid, fused, HARDWARE), inverse, fused, SCALED, HARDWARE)
    grad_gate = round_like(g * up, fused, HARDWARE) * sigmoid * (1.0 + inner * (1.0 - sigmoid))
    return round_like(grad_gate, fused, HARDWARE), round_like(g * silu, fused, HARDWARE)


def _swiglu(fused: Tensor, unit: int, mult: float, output: float) -> Tiles:
    assert fused.is_contiguous(), f"strides {fused.stride()}"
    height, width = fused.shape
    inputs, option = (fused, width, mult, 1 / mult, output), (unit, (mult, output) != (1.0, 1.0))
    return Tiles(_swiglu_values, inputs, fused, (height, width // 2), option=option, warps=16)


def _swiglu_grad(fused: Tensor, grad: Tensor, unit: int, mult: float, grad_factor: float) -> Tiles:
    assert fused.is_contiguous() and grad.is_contiguous()
    height, width = fused.shape
    inputs, option = (
        (fused, grad, width, mult, 1 / mult, grad_factor),
        (unit, (mult, grad_factor) != (1.0, 1.0)),
    )
    return Tiles(_swiglu_grad_values, inputs, fused, (height, width), unit, option)


@triton.jit
def _right_half(x, TANH: tl.constexpr):
    """(c, x·c') with ``gelu(x) = x·c(x)``: c is the normal distribution, or ``(1 + tanh(..))/2``."""
    if TANH:
        BETA: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
        KAPPA: tl.constexpr = 0.044715
        square = x * x
        c = _sigmoid(2.0 * BETA * (x + KAPPA * (square * x)))  # (1 + tanh(y)) / 2
        return c, x * (2.0 * c * (1.0 - c)) * (BETA * (1.0 + 3.0 * KAPPA * square))
    else:
        ALPHA: tl.constexpr = 0.7071067811865476  # 1 / sqrt(2)
        DENSITY: tl.constexpr = 0.3989422804014327  # 1 / sqrt(2 pi)
        c = 0.5 * (1.0 + tl.erf(x * ALPHA))
        return c, x * (DENSITY * tl.exp(-0.5 * x * x))


@triton.jit
def _gelu_values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    x, width, mult, inverse, output = inputs
    SCALED: tl.constexpr = OPTION[1]
    inner = _scaled(_load(x, row, column, inside, width), mult, x, SCALED, HARDWARE)
    c, _ = _right_half(inner, OPTION[0])
    values = _scaled(round_like(inner * c, x, HARDWARE), inverse, x, SCALED, HARDWARE)
    return _scaled(values, output, x, SCALED, HARDWARE)


@triton.jit
def _gelu_grad_values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    x, grad, width, mult, inverse, grad_factor = inputs
    SCALED: tl.constexpr = OPTION[1]
    inner = _scaled(_load(x, row, column, inside, width), mult, x, SCALED, HARDWARE)
    g = _scaled(_load(grad, row, column, inside, width), grad_factor, x, SCALED, HARDWARE)
    g = _scaled(g, inverse, x, SCALED, HARDWARE)
    c, slope = _right_half(inner, OPTION[0])
    return _scaled(round_like(g * (c + slope), x, HARDWARE), mult, x, SCALED, HARDWARE)


def _gelu(x: Tensor, tanh: bool, mult: float, output: float) -> Tiles:
    assert x.is_contiguous(), f"strides {x.stride()}"
    inputs, option = (x, x.shape[1], mult, 1 / mult, output), (tanh, (mult, output) != (1.0, 1.0))
    return Tiles(_gelu_values, inputs, x, (x.shape[0], x.shape[1]), option=option, warps=16)


def _gelu_grad(x: Tensor, grad: Tensor, tanh: bool, mult: float, grad_factor: float) -> Tiles:
    assert x.is_contiguous() and grad.is_contiguous()
    inputs = (x, grad, x.shape[1], mult, 1 / mult, grad_factor)
    option = (tanh, (mult, grad_factor) != (1.0, 1.0))
    return Tiles(_gelu_grad_values, inputs, x, (x.shape[0], x.shape[1]), option=option, warps=16)


swiglu_forward, swiglu_amax, swiglu_cast = launchers(_swiglu)
swiglu_grad_forward, swiglu_grad_amax, swiglu_grad_cast = launchers(_swiglu_grad)
gelu_forward, gelu_amax, gelu_cast = launchers(_gelu)
gelu_grad_forward, gelu_grad_amax, gelu_grad_cast = launchers(_gelu_grad)
