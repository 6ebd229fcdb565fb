"""LayerNorm and RMSNorm, with or without learned gain, computed in at least FP32 and returned in the input's
dtype.

torch has no RMSNorm kernel for CPUs, only a chain of operations, so there is one here that works on blocks of
rows: a third of the time. GPUs have a kernel, and a compiler fuses the chain itself. Both norms take another
implementation, once it is chosen, by their ``use``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.kernels import fused_op
from fp8train.kernels.norm_backend import AUTO, NormBackend
from fp8train.kernels.norms import Kind, norm_backward, residual_norm
from fp8train.kernels.package_kernels import NormFunction
from fp8train.layers.factors import scale_backward
from fp8train.layers.row_chunks import row_chunks


class _BlockedRMSNorm(torch.autograd.Function):
    """With ``r = 1 / sqrt(mean(x²) + eps)`` and ``n = x·r``: ``y = n·w``, ``grad_w = sum over rows of g·n``,
    ``grad_x = r·(g·w - n·mean(g·w·n))``. Backward keeps x and r. Shapes: x [T, H], weight [H] or None for
    w = 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gain = None if weight is None else weight.to(wide)
        y = torch.empty_like(x)
        inverse_rms = x.new_empty(x.shape[0], 1, dtype=wide)
        for rows in row_chunks(x.shape[0], x.shape[1], x.device):
            part = x[rows].to(wide)
            mean_square = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(x.shape[1])
            inverse_rms[rows] = mean_square.add_(eps).rsqrt_()
            normalised = part * inverse_rms[rows]
            y[rows] = normalised if gain is None else normalised.mul_(gain)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        wide = inverse_rms.dtype
        gain = torch.ones_like(x[0], dtype=wide) if weight is None else weight.to(wide)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(gain)
        for rows in row_chunks(x.shape[0], x.shape[1], x.device):
            r, grad = inverse_rms[rows], grads[0][rows].to(wide)
            normalised = x[rows].to(wide) * r
            product = grad * normalised
            grad_weight += product.sum(dim=0)
            mean = torch.mv(product, gain).div_(x.shape[1])[:, None]
            grad_x[rows] = (grad * gain).sub_(normalised.mul_(mean)).mul_(r)
        return grad_x, None if weight is None else grad_weight.to(weight.dtype), None


class _FusedNorm(torch.autograd.Function):
    """Either norm of [T, H] in one pass forward and one backward, for GPUs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: Kind
    ) -> Tensor:
        out = residual_norm(x, None, weight, bias, eps=eps, kind=kind)
        ctx.save_for_backward(x, out.mean, out.rstd, weight)
        ctx.has_bias = bias is not None
        return out.y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        found = norm_backward(grads[0].contiguous(), None, x, mean, rstd, weight, want_bias=ctx.has_bias)
        grad_weight = None if weight is None else found.weight
        return found.stream, grad_weight, found.bias if ctx.has_bias else None, None, None


def _fused(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: Kind) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return _FusedNorm.apply(flat, weight, bias, eps, kind).view(x.shape)


def _by(function: NormFunction, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return function(flat, weight, bias, eps).view(x.shape)


def _named(backend: NormBackend) -> str:
    """Whose it is, for ``print(model)``; our own is not said."""
    return "" if backend.fuses else f", by {backend.name}"


class RMSNorm(nn.Module):
    """RMS normalisation, ``x / sqrt(mean(x²) + eps) · weight`` over the last dim (Zhang & Sennrich 2019).

    ``gain: False`` has no weight; ``gain_grad`` multiplies the gradient of the weight.

    Attributes:
        backend: what computes it.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        dtype: torch.dtype,
        device: torch.device | None = None,
        gain: bool = True,
        gain_grad: float = 1.0,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.gain_grad = size, eps, gain_grad
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if gain else None
        self.backend = AUTO

    def use(self, backend: NormBackend) -> None:
        """Have ``backend`` compute it from here on."""
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension: [.., size] -> [.., size], in x's dtype."""
        weight = None if self.weight is None else scale_backward(self.weight, self.gain_grad)
        if self.backend.rms is not None:
            return _by(self.backend.rms, x, weight, None, self.eps)
        if fused_op.fuses_now(x):
            return _fused(x, weight, None, self.eps, "rms")
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _BlockedRMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape)
        return F.rms_norm(x, (self.size,), weight, self.eps)

    def extra_repr(self) -> str:
        """Size, eps and gain, for ``print(model)``."""
        return f"{self.size}, eps={self.eps}, gain={self.weight is not None}{_named(self.backend)}"


class LayerNorm(nn.Module):
    """Layer normalisation, ``(x - mean) / sqrt(var + eps) · weight + bias`` over the last dim (Ba et al.
    2016); the bias is optional.

    ``gain: False`` has neither weight nor bias; ``gain_grad`` multiplies the gradients of both.

    Attributes:
        backend: what computes it.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
        gain: bool = True,
        gain_grad: float = 1.0,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.gain_grad = size, eps, gain_grad

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device))

        self.weight = vector() if gain else None
        self.bias = vector() if gain and bias else None
        self.backend = AUTO

    def use(self, backend: NormBackend) -> None:
        """Have ``backend`` compute it from here on."""
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension: [.., size] -> [.., size], in x's dtype."""
        if self.backend.layer is not None:
            weight, bias = (self._vector(v, wide=False) for v in (self.weight, self.bias))
            return _by(self.backend.layer, x, weight, bias, self.eps)
        # torch's CPU kernel adds up the gradients of weight and bias in BF16: 4 % off at 4,096 tokens.
        fuses = fused_op.fuses_now(x)
        wide = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not fuses
        weight, bias = (self._vector(v, wide=wide) for v in (self.weight, self.bias))
        if fuses:
            return _fused(x, weight, bias, self.eps, "layer")
        return F.layer_norm(x.float() if wide else x, (self.size,), weight, bias, self.eps).to(x.dtype)

    def _vector(self, parameter: Tensor | None, *, wide: bool) -> Tensor | None:
        if parameter is None:
            return None
        vector = scale_backward(parameter, self.gain_grad)
        return vector.float() if wide else vector

    def extra_repr(self) -> str:
        """Size, eps, gain and bias, for ``print(model)``."""
        parts = f"gain={self.weight is not None}, bias={self.bias is not None}"
        return f"{self.size}, eps={self.eps}, {parts}{_named(self.backend)}"
