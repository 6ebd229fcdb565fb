"""Operators that hand a linear's weight gradient to its sink.

They receive the operands of the GEMM and let the :class:`~fp8train.numerics.grad_sink.GradSink` decide when
to multiply. They are operators because a Python side effect inside an autograd function breaks full-graph
compilation; an operator that declares the buffer it mutates does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.matmul import matmul
from fp8train.layers.fp8_operand import transposed
from fp8train.numerics.grad_sink import find_sink


@dataclass(frozen=True)
class SinkSlot:
    """A linear's place in a gradient sink: where its weight gradient goes.

    ``buffer`` is declared to the compiler as what the operator mutates. ``slot`` is a CPU tensor, not an int,
    so that blocks that differ only in their slots share one compiled graph.
    """

    sink: int
    slot: Tensor
    buffer: Tensor


def _contribute_grad_weight(
    grad_output: Tensor,
    x: Tensor,
    buffer: Tensor,
    slot: Tensor,
    sink: int,
    alpha: float,
    columns: Tensor | None = None,
) -> None:
    """Hand ``alpha · grad_output.T @ x · columns`` of operands in high precision to its sink: [T, N], [T, K],
    factors [K] (none: 1) -> [N, K]."""

    def compute() -> Tensor:
        product = matmul(grad_output.t(), x, alpha=alpha)
        return product if columns is None else product * columns

    find_sink(sink).contribute(int(slot), compute)


def _contribute_grad_weight_fp8(
    grad_output: Tensor,
    grad_output_scale_inv: Tensor,
    x: Tensor,
    x_scale_inv: Tensor,
    buffer: Tensor,
    slot: Tensor,
    sink: int,
    alpha: float,
    power_of_two: bool,
    out_dtype: torch.dtype,
    backend: str,
    columns: Tensor | None = None,
) -> None:
    """Hand the FP8 product ``alpha · grad_output.T @ x · columns`` to its sink. Operands are padded to 16s,
    scales are those of grad_output and x as they come: scalars, or of rows or blocks; factors [K] (none: 1)
    are without padding."""
    height, width = buffer.shape

    def compute() -> Tensor:
        operand = transposed((grad_output, grad_output_scale_inv))
        product = fp8_gemm(
            operand[0],
            x,
            operand[1],
            x_scale_inv,
            alpha=alpha,
            power_of_two=power_of_two,
            out_dtype=out_dtype,
            backend=backend,
        )
        product = product[:height, :width]
        return product if columns is None else product * columns

    find_sink(sink).contribute(int(slot), compute)


def _operator(name: str, function: Callable[..., None]) -> Any:
    """Register ``function`` as ``fp8train::name``, which mutates ``buffer``.

    As ``torch.library.custom_op`` would, but for its Python layers: those import the compiler at the first
    call, a second that a run without compilation should not spend, and cost 0.1 ms a call.
    """
    qualified = f"fp8train::{name}"
    torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=("buffer",)))
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    torch.library.register_fake(qualified, lambda *operands: None)
    return getattr(torch.ops.fp8train, name).default


contribute_grad_weight = _operator("contribute_grad_weight", _contribute_grad_weight)
contribute_grad_weight_fp8 = _operator("contribute_grad_weight_fp8", _contribute_grad_weight_fp8)
