"""LayerNorm and RMSNorm with learned gain, computed in at least FP32 and returned in the input's dtype.

torch has no RMSNorm kernel for CPUs, only a chain of operations, so there is one here that works on blocks of
rows: a third of the time. GPUs have a kernel, and a compiler fuses the chain itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.layers.blocks import row_blocks


class _BlockedRMSNorm(torch.autograd.Function):
    """With ``r = 1 / sqrt(mean(x²) + eps)`` and ``n = x·r``: ``y = n·w``, ``grad_w = sum over rows of g·n``,
    ``grad_x = r·(g·w - n·mean(g·w·n))``. Backward keeps x and r. Shapes: x [T, H], weight [H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gain = weight.to(wide)
        y = torch.empty_like(x)
        inverse_rms = x.new_empty(x.shape[0], 1, dtype=wide)
        for rows in row_blocks(x.shape[0], x.shape[1], x.device):
            part = x[rows].to(wide)
            mean_square = torch.linalg.vector_norm(part, dim=-1, keepdim=True).square_().div_(x.shape[1])
            inverse_rms[rows] = mean_square.add_(eps).rsqrt_()
            y[rows] = (part * inverse_rms[rows]).mul_(gain)
        ctx.save_for_backward(x, weight, inverse_rms)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        wide = inverse_rms.dtype
        gain = weight.to(wide)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(gain)
        for rows in row_blocks(x.shape[0], x.shape[1], x.device):
            r, grad = inverse_rms[rows], grads[0][rows].to(wide)
            normalised = x[rows].to(wide) * r
            product = grad * normalised
            grad_weight += product.sum(dim=0)
            mean = torch.mv(product, gain).div_(x.shape[1])[:, None]
            grad_x[rows] = (grad * gain).sub_(normalised.mul_(mean)).mul_(r)
        return grad_x, grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dim (Zhang & Sennrich 2019)."""

    def __init__(
        self, size: int, *, eps: float, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [.., size] -> [.., size]."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _BlockedRMSNorm.apply(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) · weight + bias`` over the last dim (Ba et al. 2016); the bias is
    optional."""

    def __init__(
        self, size: int, *, eps: float, bias: bool, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [.., size] -> [.., size]."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # torch's CPU kernel adds up the gradients of weight and bias in BF16: 4 % off at 4,096 tokens.
            bias = None if self.bias is None else self.bias.float()
            return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps).to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}, bias={self.bias is not None}"
