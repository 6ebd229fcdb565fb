"""RMSNorm and LayerNorm by NVIDIA apex's extension ``fused_layer_norm_cuda``.

It takes x [.., H] and vectors of one type, BF16 or FP32, keeps statistics in FP32, and has variants without
vectors. A LayerNorm with a weight needs a bias: zeros stand in, whose gradient is dropped. (There are
variants whose vectors have another type than x, and the result that of the vectors; ours never differ.)

``memory_efficient`` would keep the result for backward in the place of x, and find x by a division by the
weight: inexact where a weight is near zero. It saves memory where the result is kept anyway, as a BF16
linear does; an FP8 linear keeps codes. It is off.

The kernels number rows and elements in 32 bits: a micro-batch's activations have fewer than 2^31 elements.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.apex import apex
from fp8train.kernels.package_kernels import NormFunction

_MEMORY_EFFICIENT = False
_MOST_ELEMENTS = 2**31


def norms() -> tuple[NormFunction, NormFunction]:
    """Import the package, and return (RMSNorm, LayerNorm).

    Raises:
        RuntimeError: apex is not here, does not load, or is too old.
    """
    extension = apex("fused_layer_norm_cuda")
    return partial(_rms, extension), partial(_layer, extension)


def _rms(extension: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    assert bias is None, "an RMSNorm with a bias"
    return _RMSNorm.apply(_counted(x, weight), weight, eps, extension)


def _layer(extension: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _LayerNorm.apply(_counted(x, weight), weight, bias, eps, extension)


def _counted(x: Tensor, weight: Tensor | None) -> Tensor:
    assert weight is None or weight.dtype == x.dtype, f"a weight in {weight.dtype}, x in {x.dtype}"
    if x.numel() >= _MOST_ELEMENTS:
        raise ValueError(
            f"`norm`: apex counts in 32 bits, and a norm has {x.numel():,} elements; lower "
            "`micro_batch_size`, or write `norm`=auto"
        )
    return x


class _RMSNorm(torch.autograd.Function):
    """x [T, H], weight [H] or None -> y [T, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, extension: Any) -> Tensor:
        shape = [x.shape[-1]]
        if weight is None:
            y, inverse_rms = extension.rms_forward(x, shape, eps)
        else:
            y, inverse_rms = extension.rms_forward_affine(x, shape, weight, eps)
        ctx.save_for_backward(x, inverse_rms, weight)
        ctx.eps, ctx.extension = eps, extension
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse_rms, weight = ctx.saved_tensors
        grad, shape, grad_weight = grads[0].contiguous(), [x.shape[-1]], None
        if weight is None:
            grad_x = ctx.extension.rms_backward(grad, inverse_rms, x, shape, ctx.eps, _MEMORY_EFFICIENT)
        else:
            grad_x, grad_weight = ctx.extension.rms_backward_affine(
                grad, inverse_rms, x, shape, weight, ctx.eps, _MEMORY_EFFICIENT
            )
        return grad_x, grad_weight, None, None


class _LayerNorm(torch.autograd.Function):
    """x [T, H], weight [H] or None, bias [H] or None -> y [T, H]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, extension: Any
    ) -> Tensor:
        shape, ctx.has_bias = [x.shape[-1]], bias is not None
        if weight is None:
            assert bias is None, "a bias without a weight"
            y, mean, inverse_std = extension.forward(x, shape, eps)
        else:
            bias = torch.zeros_like(weight) if bias is None else bias
            y, mean, inverse_std = extension.forward_affine(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse_std, weight, bias)
        ctx.eps, ctx.extension = eps, extension
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, weight, bias = ctx.saved_tensors
        grad, shape, grad_weight, grad_bias = grads[0].contiguous(), [x.shape[-1]], None, None
        if weight is None:
            grad_x = ctx.extension.backward(grad, mean, inverse_std, x, shape, ctx.eps, _MEMORY_EFFICIENT)
        else:
            grad_x, grad_weight, grad_bias = ctx.extension.backward_affine(
                grad, mean, inverse_std, x, shape, weight, bias, ctx.eps, _MEMORY_EFFICIENT
            )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None
