"""Cross-entropy fused with the output head, a chunk of tokens at a time.

The logits of a whole micro-batch are the largest tensor of small and medium models (tokens x vocabulary, in
FP32). Nobody needs them all at once: for each chunk the loss and, while it is at hand, its gradient
``softmax(logits) - onehot(target)`` are computed, multiplied into grad_hidden and grad_weight, and dropped.
Softmax runs in FP32 (FP64 in FP64 runs) whatever the compute dtype; which products are rounded is said in
:mod:`fp8train.layers.head_gemms`. The price: gradients are computed in forward, so a forward under
``no_grad`` is the way to evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.kernels.cross_entropy import softmax_gradient, softmax_statistics, times_factor
from fp8train.kernels.fused_op import fuses
from fp8train.kernels.matmul import matmul
from fp8train.layers.fp8_head import Fp8Head, Fp8HeadGemms
from fp8train.layers.head_gemms import HeadGemms, head_gemms
from fp8train.layers.linear_plan import Alphas
from fp8train.layers.row_chunks import row_chunks

IGNORE = -100
_STANDARD = Alphas()
# CPU: glibc maps blocks of 32 MiB and more anew each time, and every page of them faults.
_CPU_CHUNK_BYTES, _GPU_CHUNK_BYTES = 16 << 20, 512 << 20
# A chunk reads the weight twice and grad_weight once, whatever its size: below this many tokens that would
# be most of its time, and the cost of a token would grow with the vocabulary squared.
_MIN_ROWS = 128


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        parallel: TensorParallel | None,
        alphas: Alphas,
        grad_enabled: bool,
        fp8: Fp8Head | None,
    ) -> Tensor:
        batch = len(targets)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        vocabulary = _Vocabulary(weight.shape[0], vocab_size, parallel)
        if parallel is not None:
            hidden = parallel.gather(hidden, batch=batch, purpose="tp_head")()
        rows = min(len(hidden), _chunk_rows(weight))
        needs_grad = grad_enabled and any(ctx.needs_input_grad[:2])
        gemms = head_gemms(weight, fp8, rows=rows, alphas=alphas, needs_grad=needs_grad)
        operand = gemms.take(hidden)
        found = _Targets.of(targets, vocabulary, gemms.wide)
        losses = torch.empty_like(found.weight)
        grad_hidden = torch.empty_like(hidden, dtype=gemms.grad_hidden_dtype) if needs_grad else None
        fused = fuses(weight) and gemms.wide == torch.float32
        softmax = _fused_softmax if fused else _softmax
        for start in range(0, len(hidden), max(1, rows)):
            part, tokens = operand[start : start + rows], slice(start, start + rows)
            losses[tokens], gradient = softmax(gemms, part, found.of_tokens(tokens), vocabulary, needs_grad)
            if grad_hidden is not None and gradient is not None:
                gemms.backward(gradient, part, out=grad_hidden[start : start + rows])
        if parallel is not None and grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
            grad_hidden = parallel.scatter_sum(grad_hidden, batch=batch, fp8=False, purpose="tp_head")()
        ctx.save_for_backward(grad_hidden, gemms.grad_weight)
        ctx.dtypes, ctx.batch = (hidden.dtype, weight.dtype), batch
        return losses.masked_fill_(found.weight == 0, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0]
        # Times a BF16 tensor, CUDA would round the factor (1 / tokens) to BF16 first and bias every gradient.
        if fuses(factor) and factor.dtype == torch.float32:
            grad_hidden = times_factor(grad_hidden, factor, ctx.dtypes[0])
            grad_weight = times_factor(grad_weight, factor, ctx.dtypes[1])
        else:
            grad_hidden = (grad_hidden.to(factor.dtype) * factor).to(ctx.dtypes[0])
            grad_weight = grad_weight.mul_(factor).to(ctx.dtypes[1])
        return (
            grad_hidden.view(ctx.batch, -1, grad_hidden.shape[1]),
            grad_weight,
            *(None,) * 6,
        )


def _chunk_rows(weight: Tensor) -> int:
    """Tokens whose logits are at hand at once; the largest intermediate is a chunk of them in FP32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    chunk = _CPU_CHUNK_BYTES if weight.device.type == "cpu" else _GPU_CHUNK_BYTES
    return max(_MIN_ROWS, chunk // (weight.shape[0] * wide.itemsize))


def _blocks(logits: Tensor, parallel: TensorParallel | None) -> list[slice]:
    """Rows of a chunk whose softmax is computed at once; each block costs its collectives."""
    if parallel is not None:
        return [slice(0, len(logits))]
    return row_chunks(logits.shape[0], logits.shape[1], logits.device)


@dataclass(frozen=True)
class _Vocabulary:
    """The columns of the logits: ``local`` of the padded vocabulary, those of this rank."""

    local: int
    size: int
    parallel: TensorParallel | None

    @property
    def first(self) -> int:
        """Token of column 0."""
        return 0 if self.parallel is None else self.parallel.rank * self.local

    @property
    def real(self) -> int:
        """Columns that are tokens, not padding."""
        return min(self.local, max(0, self.size - self.first))

    def reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """``x`` over the ranks that hold other columns, in place."""
        if self.parallel is not None:
            self.parallel.group.all_reduce(x, purpose="tp_head", op=op)()
        return x


@dataclass(frozen=True)
class _Targets:
    """Where the targets' logits are, once for all chunks; each [T, 1].

    Attributes:
        column: int64, this rank's column of the target; 0 where another rank has it, or nobody.
        weight: 1 for a target that counts, 0 for one that is left out.
        here: ``weight`` where this rank has the target's column, else 0.
    """

    column: Tensor
    weight: Tensor
    here: Tensor

    @classmethod
    def of(cls, targets: Tensor, vocabulary: _Vocabulary, wide: torch.dtype) -> _Targets:
        """Find int64 targets [T] among this rank's columns."""
        column = targets[:, None] - vocabulary.first
        here = (column >= 0) & (column < vocabulary.local)
        weight = targets[:, None] != IGNORE
        here &= weight
        return cls(column.masked_fill(~here, 0), weight.to(wide), here.to(wide))

    def of_tokens(self, tokens: slice) -> _Targets:
        """Those of some tokens."""
        return _Targets(self.column[tokens], self.weight[tokens], self.here[tokens])


def _softmax(
    gemms: HeadGemms | Fp8HeadGemms,
    hidden: Tensor,
    targets: _Targets,
    vocabulary: _Vocabulary,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The losses [t, 1] of a chunk of tokens, and the gradient of their logits if it is asked for; without
    meaning for targets that are left out."""
    logits = gemms.logits(hidden)
    losses = torch.empty_like(targets.weight)
    for block in _blocks(logits, vocabulary.parallel):
        losses[block] = _to_gradient(logits[block], targets.of_tokens(block), vocabulary, needs_grad)
    return losses, gemms.grad_logits(logits) if needs_grad else None


def _fused_softmax(
    gemms: HeadGemms | Fp8HeadGemms,
    hidden: Tensor,
    targets: _Targets,
    vocabulary: _Vocabulary,
    needs_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_softmax`, in two passes over the logits: see :mod:`fp8train.kernels.cross_entropy`."""
    logits, alpha = gemms.unscaled_logits(hidden)
    column, real = targets.column, vocabulary.real
    largest, total, score = softmax_statistics(logits, column, real=real, alpha=alpha)
    own, parallel = largest, vocabulary.parallel is not None
    if parallel:  # sums above the ranks' own maxima to sums above the largest
        largest = vocabulary.reduce(own.clone(), dist.ReduceOp.MAX)
        total = vocabulary.reduce(total.mul_((own - largest).exp_()), dist.ReduceOp.SUM)
    score = score.sub_(largest)
    if parallel:
        score = vocabulary.reduce(score.masked_fill_(targets.here == 0, 0), dist.ReduceOp.SUM)
    gradient = None
    if needs_grad:
        gradient = softmax_gradient(
            logits,
            largest,
            total,
            column,
            weight=targets.weight,
            here=targets.here,
            real=real,
            alpha=alpha,
            dtype=gemms.grad_logits_dtype,
        )
    return total.log().sub_(score), gradient


def _to_gradient(logits: Tensor, targets: _Targets, vocabulary: _Vocabulary, needs_grad: bool) -> Tensor:
    """The losses [T, 1] of logits [T, V], which become their own gradient if ``needs_grad``; without meaning
    for targets that are left out.

    With ``e = exp(logits - max)`` and ``s = sum(e)``, the loss is ``log(s) - (logits[target] - max)`` and its
    gradient ``e / s - onehot(target)``: one exponential serves both. Maximum, sum and target's score are over
    the columns of all ranks.
    """
    scores = logits.to(targets.weight.dtype)
    if vocabulary.real < vocabulary.local:
        scores[:, vocabulary.real :] = -torch.inf
    largest = vocabulary.reduce(scores.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
    scores = scores.sub_(largest)
    target_score = scores.gather(1, targets.column)
    if vocabulary.parallel is not None:
        target_score = vocabulary.reduce(target_score.masked_fill_(targets.here == 0, 0), dist.ReduceOp.SUM)
    total = vocabulary.reduce(scores.exp_().sum(dim=-1, keepdim=True), dist.ReduceOp.SUM)
    if needs_grad:
        scores.mul_(targets.weight / total).scatter_add_(1, targets.column, -targets.here)
        if scores is not logits:
            logits.copy_(scores)
    return total.log_().sub_(target_score)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    parallel: TensorParallel | None = None,
    alphas: Alphas = _STANDARD,
    fp8: Fp8Head | None = None,
) -> Tensor:
    """Sum over tokens of ``-log softmax(alpha · hidden @ weight.T)[target]``.

    Args:
        hidden: [B, S, H] or [T, H]; with ``parallel`` this rank's part [B, S/tp, H].
        weight: [V, H], V >= vocab_size; rows from ``vocab_size`` on are padding and never win. With
            ``parallel`` this rank's rows.
        targets: int64 [B, S] or [T]; ``-100`` leaves a token out.
        vocab_size: real vocabulary.
        parallel: ranks with the other rows and other parts of the sequence.
        alphas: multipliers of logits, of the gradient of hidden and of that of weight.
        fp8: how the products are formed in FP8; None: in the compute type.

    Returns:
        FP32 scalar in nats (FP64 for FP64 inputs), of the whole sequences on every rank. Its gradient may be
        taken once.
    """
    if targets.dim() == 1:
        hidden, targets = hidden.unsqueeze(0), targets.unsqueeze(0)
    # Asked here: inside an autograd function gradients are always off, and needs_input_grad ignores no_grad.
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, vocab_size, parallel, alphas, torch.is_grad_enabled(), fp8
    )


def logits(
    hidden: Tensor, weight: Tensor, *, vocab_size: int, alpha: float = 1.0, fp8: Fp8Head | None = None
) -> Tensor:
    """``alpha · hidden @ weight.T`` without the padded columns. Shapes: [.., H] -> [.., vocab_size], in the
    compute dtype; ``fp8`` as for :func:`linear_cross_entropy`, and then without a gradient.

    Raises:
        RuntimeError: an FP8 head, and something here requires a gradient.
    """
    flat = hidden.flatten(0, -2)
    if fp8 is None:
        found = matmul(flat, weight[:vocab_size].t(), alpha=alpha)
    else:
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            raise RuntimeError("logits of an FP8 head have no gradient: use the loss, or torch.no_grad()")
        alphas = Alphas(output=alpha)
        gemms = Fp8HeadGemms(fp8, weight, choices=vocab_size, alphas=alphas, needs_grad=False)
        found = gemms.logits(gemms.take(flat)).to(hidden.dtype)
    return found.view(*hidden.shape[:-1], vocab_size)
