"""RMSNorm and LayerNorm by Transformer Engine.

Its modules (``transformer_engine.pytorch.RMSNorm``) hold weights of their own and go through a scheduler of
fusible operations; we call the four functions of its extension that those end in, with our weights: one
launch forward and two backward (gradients, and the sum of their parts of the weight's).

What they take: x [T, H] and vectors [H] of one type, BF16 or FP32; statistics and sums in FP32. The weight is
used as it is (``zero_centered_gamma`` is false, which would add 1). There is no norm without a weight, so a
vector of ones stands in, whose gradient is dropped; LayerNorm alone may lack its bias.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8train.kernels.package_kernels import NormFunction
from fp8train.kernels.te import te

_SM_MARGIN = 0
"""Multiprocessors that are left to others."""
_ZERO_CENTERED = False


class _Functions(NamedTuple):
    """Transformer Engine's extension, and its names of dtypes."""

    extension: Any
    dtypes: Any


def norms() -> tuple[NormFunction, NormFunction]:
    """Import the package, and return (RMSNorm, LayerNorm).

    Raises:
        RuntimeError: Transformer Engine cannot be imported.
    """
    functions = _Functions(te("pytorch.cpp_extensions"), te("pytorch.constants").TE_DType)
    return partial(_rms, functions), partial(_layer, functions)


def _rms(te: _Functions, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    assert bias is None, "an RMSNorm with a bias"
    return _RMSNorm.apply(x, _gain(x, weight), eps, te)


def _layer(te: _Functions, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _LayerNorm.apply(x, _gain(x, weight), bias, eps, te)


def _gain(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x.new_ones(x.shape[-1])
    assert weight.dtype == x.dtype, f"a weight in {weight.dtype} for activations in {x.dtype}"
    return weight


class _RMSNorm(torch.autograd.Function):
    """x [T, H], weight [H] -> y [T, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, te: _Functions) -> Tensor:
        # No output is given, no quantiser: y is a new tensor in x's type. Of the statistics the mean is None.
        y, _, rsigma = te.extension.rmsnorm_fwd(
            x, weight, eps, None, None, te.dtypes[x.dtype], _SM_MARGIN, _ZERO_CENTERED
        )
        ctx.save_for_backward(x, rsigma, weight)
        ctx.te = te
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rsigma, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight = ctx.te.extension.rmsnorm_bwd(
            grad, x, rsigma, weight, _SM_MARGIN, _ZERO_CENTERED
        )
        return grad_x, grad_weight, None, None


class _LayerNorm(torch.autograd.Function):
    """x [T, H], weight [H], bias [H] or None -> y [T, H]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, te: _Functions
    ) -> Tensor:
        y, mean, rsigma = te.extension.layernorm_fwd(
            x, weight, bias, eps, None, None, te.dtypes[x.dtype], _SM_MARGIN, _ZERO_CENTERED
        )
        ctx.save_for_backward(x, mean, rsigma, weight)
        ctx.te, ctx.has_bias = te, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rsigma, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ctx.te.extension.layernorm_bwd(
            grads[0].contiguous(), x, mean, rsigma, weight, _SM_MARGIN, _ZERO_CENTERED
        )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None
