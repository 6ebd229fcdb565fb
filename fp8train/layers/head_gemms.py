"""The three GEMMs of an output head, one chunk of tokens after the other.

The weight [V, H] of a head is the largest of a small model, and a chunk has few tokens. So what is done *per
chunk* with the whole weight decides: it is widened once for all chunks, and each chunk's part of grad_weight
is added by the GEMM itself (``beta = 1``), not by another pass over [V, H].

=================  ===================  ======================  =========================
operands           logits               gradient of logits      grad_weight
=================  ===================  ======================  =========================
FP32, FP64         FP32, FP64           FP32, FP64              added in place
BF16, CUDA         FP32                 rounded to BF16         FP32, added in place
BF16, CPU without  FP32: operands are   FP32                    FP32, added in place
BF16 instructions  widened, exactly
BF16, CPU with     rounded to BF16 by   rounded to BF16         each chunk's rounded to
BF16 instructions  the GEMM                                     BF16, added in FP32
=================  ===================  ======================  =========================

The last row is a matter of speed: torch has no BF16 GEMM with FP32 output on CPUs, and an FP32 GEMM takes
twice as long where BF16 ones are native. Softmax runs in FP32 either way. In FP8:
:mod:`fp8train.layers.fp8_head`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.matmul import cpu_multiplies_bf16
from fp8train.layers.fp8_head import Fp8Head, Fp8HeadGemms
from fp8train.layers.linear_plan import Alphas


class HeadGemms:
    """The GEMMs of one forward pass over chunks of at most ``rows`` tokens.

    Attributes:
        wide: type of sums: FP32, or FP64 for FP64 operands.
        grad_logits_dtype: type in which :meth:`grad_hidden` and :meth:`add_grad_weight` multiply.
        grad_hidden_dtype: type in which :meth:`grad_hidden` gives its result.
        grad_weight: the sum so far, [V, H] in ``wide``; None without gradients.
    """

    def __init__(self, weight: Tensor, *, rows: int, alphas: Alphas, needs_grad: bool) -> None:
        """Widen the weight where that is how it is multiplied, and allocate what chunks share.

        Args:
            weight: [V, H].
            rows: tokens of the largest chunk; 0 if there is none.
            alphas: multipliers of logits, of the gradient of hidden and of that of weight.
            needs_grad: whether gradients will be asked for.
        """
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self._alphas = alphas
        half = weight.dtype == torch.bfloat16
        self._gpu = half and weight.device.type != "cpu"
        self._rounds = half and weight.device.type == "cpu" and cpu_multiplies_bf16()
        narrow = self._gpu or self._rounds
        self._weight = weight if narrow else weight.to(self.wide)
        self.grad_logits_dtype = self._weight.dtype
        self.grad_hidden_dtype = weight.dtype if narrow else self.wide
        logits_dtype = weight.dtype if self._rounds else self.wide
        self._logits = torch.empty(rows, weight.shape[0], dtype=logits_dtype, device=weight.device)
        self._part: Tensor | None = None
        self.grad_weight: Tensor | None = None
        # The first chunk of a GPU writes, the others add.
        self._beta = 0 if self._gpu and rows else 1
        if needs_grad:
            make = torch.zeros if self._beta else torch.empty
            self.grad_weight = make(weight.shape, dtype=self.wide, device=weight.device)
            if self._rounds:
                self._part = torch.empty_like(weight)

    def take(self, hidden: Tensor) -> Tensor:
        """The input of all chunks as the other methods take rows of it: itself."""
        return hidden

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """``alpha · hidden @ weight.T``: [t, H] -> [t, V], in memory that the next call overwrites."""
        out, alpha = self.unscaled_logits(hidden)
        return out if alpha == 1.0 else out.mul_(alpha)

    def unscaled_logits(self, hidden: Tensor) -> tuple[Tensor, float]:
        """``hidden @ weight.T`` as :meth:`logits`, and what it is still to be multiplied by. A GEMM of BF16
        with an FP32 result has no ``alpha``, and who reads the logits may as well multiply them."""
        out, alpha = self._logits[: len(hidden)], self._alphas.output
        if self._gpu:
            return torch.ops.aten.mm.dtype_out(
                self._operand(hidden), self._weight.t(), self.wide, out=out
            ), alpha
        return self._gemm(self._operand(hidden), self._weight.t(), out, alpha), 1.0

    def grad_logits(self, gradient: Tensor) -> Tensor:
        """The gradient of the logits as the next two GEMMs take it, [t, V]: rounded to BF16 on CUDA."""
        return gradient.to(self.grad_logits_dtype)

    def backward(self, gradient: Tensor, hidden: Tensor, out: Tensor) -> None:
        """:meth:`grad_hidden` and :meth:`add_grad_weight` of one chunk."""
        self.grad_hidden(gradient, out)
        self.add_grad_weight(gradient, hidden)

    def grad_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """``out = alpha · gradient @ weight``: [t, V] -> [t, H]; ``out`` in :attr:`grad_hidden_dtype`."""
        self._gemm(gradient, self._weight, out, self._alphas.grad_input)

    def add_grad_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        """``grad_weight += alpha · gradient.T @ hidden``: [t, V], [t, H] -> [V, H]."""
        total, alpha = self.grad_weight, self._alphas.grad_weight
        assert total is not None, "made without gradients"
        if self._part is not None:
            total += self._gemm(gradient.t(), hidden, self._part, alpha)
        elif self._gpu:
            torch.ops.aten.addmm.dtype_out(
                total, gradient.t(), hidden, self.wide, beta=self._beta, alpha=alpha, out=total
            )
            self._beta = 1
        else:
            total.addmm_(gradient.t(), self._operand(hidden), alpha=alpha)

    def _gemm(self, a: Tensor, b: Tensor, out: Tensor, alpha: float) -> Tensor:
        """``out = alpha · a @ b``, accumulated in FP32 or wider."""
        if alpha == 1.0:
            return torch.mm(a, b, out=out)
        return torch.addmm(out.new_zeros(1), a, b, beta=0, alpha=alpha, out=out)


def head_gemms(
    weight: Tensor,
    fp8: Fp8Head | None,
    *,
    rows: int,
    alphas: Alphas,
    needs_grad: bool,
    choices: int | None = None,
) -> HeadGemms | Fp8HeadGemms:
    """The GEMMs of a head: in FP8 as ``fp8`` says, else (None) in the compute type.

    Args:
        weight: [V, H].
        fp8: of the model.
        rows: as for :class:`HeadGemms`, and so are the others.
        choices: rows of the weight that have logits; None: all. Fewer only without gradients.
    """
    if fp8 is not None:
        return Fp8HeadGemms(fp8, weight, choices=choices, alphas=alphas, needs_grad=needs_grad)
    weight = weight if choices is None else weight[:choices]
    return HeadGemms(weight, rows=rows, alphas=alphas, needs_grad=needs_grad)
