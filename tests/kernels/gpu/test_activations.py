"""Launchers of activations against the layers' arithmetic and against autograd in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.activations import gelu, gelu_grad, halves, swiglu, swiglu_grad
from fp8train.kernels.operands import CastRule
from fp8train.layers import swiglu as layer
from fp8train.layers.factors import Factors, scale
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same
from tests.kernels.gpu.tiled import check_launchers, check_references

X, GRADIENT = CastRule.of(QuantSpec(E4M3)), CastRule.of(QuantSpec(E5M2, power_of_two=False))
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(64, 256, 128), (5, 24, 8), (70, 20, 4), (3, 9, 1), (1, 384, 128), (0, 32, 32)]
"""(T, F, unit)"""
FACTORS = [(1.0, 1.0, 1.0), (1.5, 0.3, 0.7)]
"""(mult, factor of the result, factor of the gradient)"""


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal, or where ``exp`` differs in its last bits moved to the neighbour: few in BF16. A value of the
    chain that moves before the last product moves that by as much. ``1 + erf(x)`` and ``1 + tanh(x)`` of
    negative x are exact to FP32's absolute error alone, in torch too."""
    absolute = 1e-5
    if dtype == torch.float32:
        return torch.allclose(a, b, rtol=3e-6, atol=absolute)
    a, b = a.float(), b.float()
    moved = ~torch.isclose(a, b, rtol=0, atol=absolute, equal_nan=True)
    near = torch.allclose(a, b, rtol=2**-6, atol=absolute, equal_nan=True)
    return near and int(moved.sum()) <= 1 + 0.005 * a.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_swiglu_is_the_layers(
    shape: tuple[int, int, int], dtype: torch.dtype, factors: tuple[float, float, float]
) -> None:
    rows, width, unit = shape
    mult, output, grad_factor = factors
    fused = draw(rows, 2 * width, seed=0, dtype=dtype).requires_grad_()
    grad = draw(rows, width, seed=1, dtype=dtype)
    expected = layer.swiglu(fused, unit=unit, mult=mult, factors=Factors(output, grad_factor))
    expected.backward(grad)
    assert fused.grad is not None
    inputs = (fused.detach(), unit, mult, output)
    inputs_grad = (fused.detach(), grad, unit, mult, grad_factor)
    assert same(check_references(swiglu, inputs, X), expected.detach())
    assert same(check_references(swiglu_grad, inputs_grad, GRADIENT), fused.grad)
    assert close(check_launchers(swiglu, inputs, X), expected, dtype)
    assert close(check_launchers(swiglu_grad, inputs_grad, GRADIENT), fused.grad, dtype)


def test_swiglu_against_autograd_in_fp64() -> None:
    fused, grad = (draw(40, width, seed=width, dtype=torch.float32) for width in (96, 48))
    true = fused.double().requires_grad_()
    gate, up = (part.flatten(1) for part in halves(true, 16))
    value = 0.5 * F.silu(1.25 * gate) / 1.25 * up
    value.backward(grad.double())
    assert true.grad is not None
    launched = swiglu.operations[0].launch(fused, 16, 1.25, 0.5)
    torch.testing.assert_close(launched.double(), value.detach(), rtol=2e-6, atol=1e-6)
    launched = swiglu_grad.operations[0].launch(fused, grad, 16, 1.25, 0.5)
    torch.testing.assert_close(launched.double(), true.grad, rtol=4e-6, atol=2e-6)


def gelu_chain(x: Tensor, tanh: bool, mult: float, factors: Factors) -> Tensor:
    """As :class:`fp8train.layers.mlp.MLP` computes it."""
    activated = F.gelu(x if mult == 1.0 else x * mult, approximate="tanh" if tanh else "none")
    return scale(activated if mult == 1.0 else activated * (1 / mult), factors)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (70, 52), (3, 9), (0, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_gelu_is_the_layers(
    tanh: bool, shape: tuple[int, int], dtype: torch.dtype, factors: tuple[float, float, float]
) -> None:
    mult, output, grad_factor = factors
    x, grad = draw(*shape, seed=0, dtype=dtype).requires_grad_(), draw(*shape, seed=1, dtype=dtype)
    expected = gelu_chain(x, tanh, mult, Factors(output, grad_factor))
    expected.backward(grad)
    assert x.grad is not None
    inputs, inputs_grad = (x.detach(), tanh, mult, output), (x.detach(), grad, tanh, mult, grad_factor)
    assert same(check_references(gelu, inputs, X), expected.detach())
    assert same(check_references(gelu_grad, inputs_grad, GRADIENT), x.grad)
    assert close(check_launchers(gelu, inputs, X), expected, dtype)
    assert close(check_launchers(gelu_grad, inputs_grad, GRADIENT), x.grad, dtype)


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_against_autograd_in_fp64(tanh: bool) -> None:
    x, grad = (draw(40, 48, seed=seed, dtype=torch.float32) for seed in (0, 1))
    true = x.double().requires_grad_()
    value = F.gelu(true, approximate="tanh" if tanh else "none")
    value.backward(grad.double())
    assert true.grad is not None
    launched = gelu.operations[0].launch(x, tanh, 1.0, 1.0)
    torch.testing.assert_close(launched.double(), value.detach(), rtol=2e-6, atol=1e-6)
    launched = gelu_grad.operations[0].launch(x, grad, tanh, 1.0, 1.0)
    torch.testing.assert_close(launched.double(), true.grad, rtol=4e-6, atol=2e-6)


CASES: list[Any] = [(swiglu, swiglu_grad, (32,)), (gelu, gelu_grad, (False,)), (gelu, gelu_grad, (True,))]


@pytest.mark.parametrize("case", CASES, ids=["swiglu", "gelu", "gelu_tanh"])
def test_what_is_not_finite_arrives_as_in_torch(case: Any) -> None:
    formula, gradient, option = case
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 3e38, -3e38, 0.0, -0.0])
    if option == (False,):  # of infinity torch's CPU kernel for BF16 makes NaN, of 3e38 infinity
        special = special.where(special.abs() < 1e38, torch.nan)
    x = draw(9, 64, seed=0, dtype=torch.bfloat16)
    x[:, 5], x[:, 40] = special.bfloat16(), special.flip(0).bfloat16()
    grad = draw(9, 32 if formula is swiglu else 64, seed=1, dtype=torch.bfloat16)
    for which, inputs in ((formula, (x, *option, 1.0, 1.0)), (gradient, (x, grad, *option, 1.0, 1.0))):
        launched, expected = which.operations[0].launch(*inputs), which.forward(*inputs)
        assert torch.equal(launched.isnan(), expected.isnan())
        assert torch.equal(launched.isinf(), expected.isinf())
        assert close(launched, expected, x.dtype)
        assert which.operations[1].launch(*inputs).isnan().any()
