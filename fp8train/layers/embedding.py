"""Token and learned-position embeddings, and the output head's weight.

A module reads its weight in its own forward and nowhere else: who gathers parameters module by module
(ZeRO-3) has its values there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.comm.sequence_parallel import TensorParallel


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


class _SplitEmbedding(torch.autograd.Function):
    """A table whose rows lie on several ranks: index [B, S] -> this rank's part [B, S/tp, H].

    Each rank looks its own rows up; of the terms of the sum over ranks all but one are zero, so it is exact.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, parallel: TensorParallel) -> Tensor:
        rows = weight.shape[0]
        local = index - parallel.rank * rows
        outside = (local < 0) | (local >= rows)
        local = local.masked_fill(outside, 0)
        ctx.save_for_backward(local, outside)
        ctx.rows, ctx.dtype, ctx.parallel = rows, weight.dtype, parallel
        found = F.embedding(local, weight).masked_fill_(outside.unsqueeze(-1), 0)
        part = parallel.scatter_sum(
            found.flatten(0, 1), batch=len(index), fp8=False, purpose="tp_embedding"
        )()
        return part.view(len(index), -1, weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        local, outside = ctx.saved_tensors
        grad = ctx.parallel.gather(grads[0].flatten(0, 1), batch=len(local), purpose="tp_embedding")()
        wide = torch.promote_types(ctx.dtype, torch.float32)
        grad = grad.to(wide).masked_fill(outside.flatten().unsqueeze(-1), 0)
        result = torch.ops.aten.embedding_dense_backward(grad, local.flatten(), ctx.rows, -1, False)
        return result.to(ctx.dtype), None, None


class _Table(nn.Module):
    """Weight [rows, size], or with ``parallel`` this rank's rows of it."""

    def __init__(
        self,
        rows: int,
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        rows //= 1 if parallel is None else parallel.size
        self.weight = nn.Parameter(torch.empty(rows, size, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        """Rows and size, for ``print(model)``."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


Multiply = Callable[[Tensor, Tensor], Tensor]
"""What is made of hidden [.., H] and a head's weight [V, H]."""


class OutputHead(_Table):
    """An output head with a weight of its own, [padded vocabulary, H]."""

    def forward(self, hidden: Tensor, multiply: Multiply) -> Tensor:
        """``multiply(hidden, weight)``: the loss, or logits; :mod:`fp8train.layers.loss` has both."""
        return multiply(hidden, self.weight)


class TiedHead(nn.Module):
    """An output head whose weight is that of the token embedding."""

    def __init__(self, table: Embedding) -> None:
        super().__init__()
        self._table = (table,)  # not a submodule: parameters have one name

    @property
    def weight(self) -> nn.Parameter:
        """[padded vocabulary, H], the embedding's."""
        return self._table[0].weight

    def forward(self, hidden: Tensor, multiply: Multiply) -> Tensor:
        """Make the loss, or logits, of ``hidden`` and the weight: ``multiply(hidden, weight)``."""
        return multiply(hidden, self.weight)


class Positions(_Table):
    """Learned vectors of positions."""

    def forward(self, start: int, stop: int) -> Tensor:
        """Those of consecutive positions: [stop - start, size]."""
        return self.weight[start:stop]


class Embedding(_Table):
    """A table of vectors, of which some are read."""

    def forward(self, index: Tensor) -> Tensor:
        """Shapes: int64 [..] -> [.., size]; with ``parallel`` [B, S] -> [B, S/tp, size]."""
        if self.parallel is not None:
            return _SplitEmbedding.apply(self.weight, index, self.parallel)
        if self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu":
            return _WideGradEmbedding.apply(self.weight, index)
        return F.embedding(index, self.weight)
