"""Cross-entropy of logits and its gradient: the logits are read twice, the gradient is written once.

Two operations, one launch each. The first finds, in one pass, each row's maximum and the sum of exponentials
above it, rescaling the sum where a larger logit appears (Milakov and Gimelshein 2018, arXiv 1805.02867,
algorithm 3). The second has both and writes ``softmax - onehot``, rounded to what the next GEMMs multiply.
Between them ranks that hold other columns of a vocabulary agree on maximum and sum.

Logits are multiplied by ``alpha`` where they are read, so that a multiplier costs no pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes


def _scores(logits: Tensor, real: int, alpha: float) -> Tensor:
    scores = logits.float() * alpha
    scores[:, real:] = -torch.inf
    return scores


def _softmax_statistics(
    logits: Tensor, column: Tensor, real: int, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(logits, real, alpha)
    largest = scores.amax(dim=1, keepdim=True)
    return largest, (scores - largest).exp().sum(dim=1, keepdim=True), scores.gather(1, column)


def _softmax_statistics_fake(
    logits: Tensor, column: Tensor, real: int, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty(column.shape, dtype=torch.float32),
        logits.new_empty(column.shape, dtype=torch.float32),
        logits.new_empty(column.shape, dtype=torch.float32),
    )


_statistics_op = FusedOp(
    _softmax_statistics,
    launcher="fp8train.kernels.gpu.cross_entropy:softmax_statistics",
    fake=_softmax_statistics_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:2]), nbytes(*out)),
)


def softmax_statistics(
    logits: Tensor, column: Tensor, *, real: int, alpha: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss of each row is made of; the sum is NaN where a row has NaN or infinity.

    Args:
        logits: [T, V], BF16 or FP32.
        column: int64 [T, 1], the target's.
        real: columns from this one on are padding and never win.
        alpha: multiplies logits.

    Returns:
        (maximum, sum of ``exp(logit - maximum)``, the target's logit), FP32 [T, 1] each.
    """
    largest, total, score = _statistics_op(logits, column, real, alpha)
    return largest, total, score


def _softmax_gradient(
    logits: Tensor,
    largest: Tensor,
    total: Tensor,
    column: Tensor,
    weight: Tensor,
    here: Tensor,
    real: int,
    alpha: float,
    dtype: torch.dtype,
) -> Tensor:
    scores = (_scores(logits, real, alpha) - largest).exp_().mul_(weight / total)
    return scores.scatter_add_(1, column, -here).to(dtype)


def _softmax_gradient_fake(
    logits: Tensor,
    largest: Tensor,
    total: Tensor,
    column: Tensor,
    weight: Tensor,
    here: Tensor,
    real: int,
    alpha: float,
    dtype: torch.dtype,
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


_gradient_op = FusedOp(
    _softmax_gradient,
    launcher="fp8train.kernels.gpu.cross_entropy:softmax_gradient",
    fake=_softmax_gradient_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:6]), nbytes(out)),
)


def softmax_gradient(
    logits: Tensor,
    largest: Tensor,
    total: Tensor,
    column: Tensor,
    *,
    weight: Tensor,
    here: Tensor,
    real: int,
    alpha: float = 1.0,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of each row's loss, ``weight · softmax - here · onehot(column)``.

    Args:
        logits: [T, V], BF16 or FP32.
        largest: FP32 [T, 1], the maximum of a row over all ranks.
        total: FP32 [T, 1], the sum of exponentials above it.
        column: int64 [T, 1], the target's.
        weight: FP32 [T, 1], 0 for rows that are left out.
        here: FP32 [T, 1], ``weight`` where this rank has the target's column, else 0.
        real: columns from this one on are padding.
        alpha: multiplies logits; the gradient is that of the products.
        dtype: of the result, BF16 or FP32.

    Returns:
        [T, V] in ``dtype``.
    """
    result: Tensor = _gradient_op(logits, largest, total, column, weight, here, real, alpha, dtype)
    return result


def _times_factor(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * factor).to(dtype, copy=True)


def _times_factor_fake(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


_times_op = FusedOp(
    _times_factor,
    launcher="fp8train.kernels.gpu.cross_entropy:times_factor",
    fake=_times_factor_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:2]), nbytes(out)),
)


def times_factor(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x · factor``, formed in FP32 and rounded once. Args: BF16 or FP32; FP32 scalar on its
    device; BF16 or FP32."""
    result: Tensor = _times_op(x.contiguous(), factor, dtype)
    return result
