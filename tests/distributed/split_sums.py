"""One process that rounds its sums as tensor-parallel ranks do.

Tensor-parallel ranks round the partial sums of row-parallel outputs and column-parallel input gradients to
the compute type (or to FP8 with block scales) before they add them; one process rounds the total. In BF16
the two therefore differ, and every later FP8 cast and layer makes more of it. A process that does the same
rounding has no such excuse: what is left of the difference is an error of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.exchange_sum import pack, sum_parts
from fp8train.layers import fp8_linear, loss
from fp8train.layers import linear as linear_module
from fp8train.layers.head_gemms import HeadGemms
from fp8train.models.shapes import split_dim
from fp8train.numerics.block_scales import as_blocks, from_blocks, quantize_blocks
from fp8train.precision.number_formats import E4M3
from fp8train.precision.scale_blocks import block_size
from fp8train.step.trainer import Trainer

Product = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def sums_in_parts(trainer: Trainer, parts: int, *, fp8_grad_input: bool = False) -> Iterator[None]:
    """Multiply as ``parts`` tensor-parallel ranks would, in a process that is alone.

    Args:
        trainer: of one process.
        parts: tensor-parallel ranks.
        fp8_grad_input: whether input gradients of FP8 linears travel in FP8.
    """
    model = trainer.model
    linears = model.linears()
    cut_by_row = {name: split_dim(f"{name}.weight") == 1 for name in linears}
    plans = {name: linear.plan for name, linear in linears.items()}
    by_plan, by_weight = {}, {}
    for name, linear in linears.items():
        if linear.plan is None:
            by_weight[linear.weight.data_ptr()] = cut_by_row[name]
        else:
            linear.plan = replace(linear.plan)  # one of its own, to be told apart by
            by_plan[id(linear.plan)] = cut_by_row[name]
    multiply, matmul, to_gradient = fp8_linear._multiply, linear_module.matmul, loss._to_gradient
    grad_hidden, compute = HeadGemms.grad_hidden, model.head_weight.dtype

    def fp8_product(
        plan: Any, a: Any, b: Any, specs: Any, alpha: float, dtype: torch.dtype, **more: Any
    ) -> Tensor:
        forward = specs == (plan.quant.output_x, plan.quant.output_w)

        def product(a_payload: Tensor, b_payload: Tensor) -> Tensor:
            return multiply(plan, (a_payload, a[1]), (b_payload, b[1]), specs, alpha, dtype, **more)

        if forward != by_plan[id(plan)]:
            return product(a[0], b[0])
        return _sum(product, a[0], b[0], parts, fp8=fp8_grad_input and not forward)

    def product(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
        # Outputs multiply the transpose, input gradients the weight itself, weight gradients neither.
        scaled = partial(matmul, alpha=alpha)
        if by_weight.get(b.data_ptr()) == (not b.is_contiguous()):
            return _sum(scaled, a, b, parts, fp8=False)
        return scaled(a, b)

    def heads_grad_hidden(gemms: HeadGemms, gradient: Tensor, out: Tensor) -> None:
        # Ranks hold columns of the logits, and round their sums over those.
        def product(a: Tensor, b: Tensor) -> Tensor:
            return (torch.mm(a, b) * gemms._alphas.grad_input).to(compute)

        out.copy_(_sum(product, gradient, gemms._weight, parts, fp8=False))

    fp8_linear._multiply, linear_module.matmul = fp8_product, product
    HeadGemms.grad_hidden = heads_grad_hidden  # type: ignore[method-assign]
    loss._to_gradient = partial(_softmax_in_parts, parts=parts)
    try:
        yield
    finally:
        fp8_linear._multiply, linear_module.matmul = multiply, matmul
        HeadGemms.grad_hidden = grad_hidden  # type: ignore[method-assign]
        loss._to_gradient = to_gradient
        for name, linear in linears.items():
            linear.plan = plans[name]


def _sum(product: Product, a: Tensor, b: Tensor, parts: int, *, fp8: bool) -> Tensor:
    """``a @ b``, a sum of ``parts`` rounded products, added in rank order."""
    a_parts, b_parts = a.chunk(parts, dim=1), b.chunk(parts, dim=0)
    products = [product(x.contiguous(), _like(b, y)) for x, y in zip(a_parts, b_parts, strict=True)]
    shape, dtype = products[0].shape, products[0].dtype
    if fp8:
        block = block_size(shape[1])
        messages = [pack(*quantize_blocks(as_blocks(one, block), E4M3), 1) for one in products]
        return from_blocks(sum_parts(torch.cat(messages), block, E4M3), shape).to(dtype)
    total = products[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for one in products[1:]:
        total += one
    return total.to(dtype)


def _softmax_in_parts(
    logits: Tensor, targets: Any, vocabulary: Any, needs_grad: bool, *, parts: int
) -> Tensor:
    """Losses [T, 1] and gradient of logits [T, V], their exponentials summed in parts. No target is left
    out."""
    scores = logits.to(targets.weight.dtype, copy=True)
    scores[:, vocabulary.real :] = -torch.inf
    scores -= scores.amax(dim=1, keepdim=True)
    score = scores.gather(1, targets.column)
    exponentials = scores.exp()
    sums = [part.contiguous().sum(dim=1, keepdim=True) for part in exponentials.chunk(parts, dim=1)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    if needs_grad:
        gradient = exponentials * (1 / sums[0])
        logits.copy_(gradient.scatter_add(1, targets.column, -torch.ones_like(score)))
    return sums[0].log() - score


def _like(whole: Tensor, part: Tensor) -> Tensor:
    """``part`` with the memory order of ``whole``, which GEMMs insist on."""
    return part.contiguous() if whole.is_contiguous() else part.t().contiguous().t()
