"""Token and learned-position embeddings, and the output head's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _WideGradEmbedding(torch.autograd.Function):
    """``F.embedding`` whose weight gradient is added up in FP32 and rounded once, as torch does on CUDA.

    torch's CPU kernel adds in BF16, where a sum stops growing at 256 equal terms: the gradients of the
    commonest tokens would be wrong.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        wide = torch.ops.aten.embedding_dense_backward(grads[0].float(), index, ctx.rows, -1, False)
        return wide.to(ctx.dtype), None


class Embedding(nn.Module):
    """A table of vectors: weight [rows, size]."""

    def __init__(
        self, rows: int, size: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, dtype=dtype, device=device))

    def forward(self, index: Tensor) -> Tensor:
        """Shapes: int64 [..] -> [.., size]."""
        if self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu":
            return _WideGradEmbedding.apply(self.weight, index)
        return F.embedding(index, self.weight)

    def extra_repr(self) -> str:
        """Rows and size."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class OutputHead(nn.Module):
    """Weight [padded vocabulary, H] of an untied output head; :mod:`fp8train.layers.loss` multiplies
    with it."""

    def __init__(
        self, rows: int, size: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        """Rows and size."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
