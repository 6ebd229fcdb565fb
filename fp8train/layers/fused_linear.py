"""A linear inside a fused function: its three GEMMs, and the casts of what goes in.

What a linear multiplies is often made by a formula just before (a norm, a non-linearity), and its gradient by
another just behind (RoPE). On a GPU the formula and the cast of its result are one pass over memory, so an
autograd function spans both: :mod:`fp8train.layers.fused_mlp`, :mod:`fp8train.layers.fused_heads`. This
is the part that they share. Codes are those of :mod:`fp8train.layers.fp8_linear`, which says which GEMM reads
what; without an FP8 plan the operands are the values themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.matmul import matmul
from fp8train.kernels.operands import CastOperand, CastRule, amax_partials, cast_operand
from fp8train.kernels.padding import Operand
from fp8train.kernels.tiled import TiledValues
from fp8train.layers.fp8_linear import CastSlots
from fp8train.layers.fp8_operand import agreed_cast, transposed
from fp8train.layers.grad_weight_op import SinkSlot, contribute_grad_weight, contribute_grad_weight_fp8
from fp8train.layers.linear_plan import LinearCall
from fp8train.layers.wire import OperandName
from fp8train.numerics.scale_state import ScaleSlot
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.operand_cast import QuantSpec

Kept = tuple[Tensor | None, Tensor | None]
"""(payload, scale_inv) of an operand that backward reads; (values, None) in high precision; (None, None) if
it is to be made again."""


class Source:
    """A matrix [M, K] that is read once or twice to make an operand: values in memory, or a formula."""

    def __init__(
        self,
        rows: int,
        forward: Callable[[], Tensor],
        amax: Callable[[], Tensor],
        cast: Callable[..., CastOperand],
    ) -> None:
        """Args: ``rows``: M; ``forward``: makes the values, contiguous; ``amax``: partials of their amax;
        ``cast``: as :func:`~fp8train.kernels.operands.cast_operand` after its first argument, by
        keywords."""
        self.rows, self.forward, self.amax, self.cast = rows, forward, amax, cast

    @classmethod
    def of_values(cls, x: Tensor, partials: Tensor | None = None) -> Source:
        """Values that lie in memory; ``partials``: of their amax, where they are known."""
        x = x.contiguous()
        return cls(
            len(x),
            lambda: x,
            lambda: amax_partials(x) if partials is None else partials,
            lambda *, partials, rule, **layouts: cast_operand(x, partials, rule, **layouts),
        )

    @classmethod
    def of_formula(cls, values: TiledValues, *inputs: Any, rows: int) -> Source:
        """What a formula makes of its inputs."""
        return cls(
            rows,
            lambda: values.forward(*inputs),
            lambda: values.amax(*inputs),
            lambda **how: values.cast(*inputs, **how),
        )


def fusable(quant: LinearQuant) -> bool:
    """Whether a linear's casts are those of fused functions: one scale for each tensor, and backward reads
    the codes that forward made."""
    one_scale = all(
        spec.granularity == "tensor" and spec.scale_source != "mse" for spec in quant.quantised().values()
    )
    same = quant.keep_x == quant.keep_w == "same" and quant.grad_weight_fp8 and quant.shares_grad_output
    return one_scale and same and not quant.is_nvfp4


@dataclass(frozen=True)
class FusedLinear:
    """One linear's share of a fused function; made by :meth:`fp8train.layers.linear.Linear.fused`.

    Attributes:
        call: multipliers, plan, sink, and whether there will be a backward.
        slots: scales of delayed casts.
        sink_slot: where the weight gradient goes; None returns it to autograd.
        shape: of the weight, [N, K].
        dtype: of products.
        keeps_input: without a plan: whether forward's input is kept for backward, or made again there.
    """

    call: LinearCall
    slots: CastSlots
    sink_slot: SinkSlot | None
    shape: torch.Size
    dtype: torch.dtype
    keeps_input: bool = True

    @property
    def _quant(self) -> LinearQuant | None:
        return None if self.call.plan is None else self.call.plan.quant

    def forward(self, source: Source, weight: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Kept]:
        """``alpha · source @ weight.T``.

        Args:
            source: [T, K].
            weight: codes [N, K] and scale; or values and None.

        Returns:
            The product [T, N], and what :meth:`backward` needs of the source.
        """
        values, scale_inv = weight
        quant, alphas = self._quant, self.call.alphas
        if quant is None or scale_inv is None:
            x = source.forward()
            return matmul(x, values.t(), alpha=alphas.output), (x if self.keeps_input else None, None)
        both = self._cast(source, quant.output_x, self.slots.output_x, "x", 1, turned=self.call.trains)
        operand, w = (both.codes, both.scale_inv), transposed((values, scale_inv))
        specs = (quant.output_x, quant.output_w)
        product = self._multiply(operand, w, specs, alphas.output, fast=quant.fast_accumulation)
        return product[: source.rows, : self.shape[0]], (both.turned, both.scale_inv)

    def backward(
        self, gradient: Source, kept: Kept, weight: Kept, source: Callable[[], Source]
    ) -> tuple[Tensor, Tensor | None]:
        """Both backward GEMMs.

        Args:
            gradient: of the product, [T, N].
            kept: from :meth:`forward`.
            weight: the operand of grad_input.
            source: makes the input again, where it was not kept.

        Returns:
            The gradient of the source [T, K], and that of the weight; None if the sink has it.
        """
        quant, alphas = self._quant, self.call.alphas
        w, w_scale_inv = weight
        assert w is not None
        if quant is None or w_scale_inv is None:
            g = gradient.forward()
            x = source().forward() if kept[0] is None else kept[0]
            grad_input = matmul(g, w, alpha=alphas.grad_input)
            return grad_input, self._grad_weight(g, x)
        spec, slot = quant.grad_input_grad_output, self.slots.grad_input_grad_output
        both = self._cast(gradient, spec, slot, "grad_output", 1)
        specs = (spec, quant.grad_input_w)
        grad_input = self._multiply((both.codes, both.scale_inv), (w, w_scale_inv), specs, alphas.grad_input)[
            : gradient.rows, : self.shape[1]
        ]
        codes, x_scale_inv = kept
        assert codes is not None and x_scale_inv is not None
        x_operand, g_operand = (codes.t(), x_scale_inv), (both.turned.t(), both.scale_inv)
        return grad_input, self._grad_weight_fp8(g_operand, x_operand, quant)

    def _cast(
        self,
        source: Source,
        spec: QuantSpec,
        slot: ScaleSlot | None,
        operand: OperandName,
        contracted: int,
        *,
        turned: bool = True,
    ) -> CastOperand:
        def cast(partials: Tensor, rule: CastRule, delayed: Tensor | None) -> CastOperand:
            return source.cast(partials=partials, rule=rule, delayed=delayed, straight=True, turned=turned)

        agree = self.call.wire.agreement(operand, spec, contracted)
        return agreed_cast(source.amax(), spec, slot, agree, cast)

    def _multiply(
        self,
        a: Operand,
        b: Operand,
        specs: tuple[QuantSpec, QuantSpec],
        alpha: float,
        *,
        fast: bool = False,
    ) -> Tensor:
        assert self.call.plan is not None
        return fp8_gemm(
            a[0],
            b[0],
            a[1],
            b[1],
            alpha=alpha,
            power_of_two=specs[0].power_of_two and specs[1].power_of_two,
            out_dtype=self.dtype,
            backend=self.call.plan.backend.name,
            fast_accumulation=fast,
        )

    def _grad_weight(self, gradient: Tensor, x: Tensor) -> Tensor | None:
        alpha, slot = self.call.alphas.grad_weight, self.sink_slot
        if slot is None:
            return matmul(gradient.t(), x, alpha=alpha)
        contribute_grad_weight(gradient, x, slot.buffer, slot.slot, self.call.sink, alpha)
        return None

    def _grad_weight_fp8(self, gradient: Operand, x: Operand, quant: LinearQuant) -> Tensor | None:
        alpha, slot = self.call.alphas.grad_weight, self.sink_slot
        specs = (quant.grad_weight_grad_output, quant.grad_weight_x)
        assert self.call.plan is not None
        if slot is None:
            product = self._multiply(transposed(gradient), x, specs, alpha)
            return product[: self.shape[0], : self.shape[1]]
        contribute_grad_weight_fp8(
            *gradient,
            *x,
            slot.buffer,
            slot.slot,
            self.call.sink,
            alpha,
            specs[0].power_of_two and specs[1].power_of_two,
            self.dtype,
            self.call.plan.backend.name,
        )
        return None
