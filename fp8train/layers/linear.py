"""The linear layer and its three GEMMs, in high precision or FP8.

With input x [.., K], weight w [N, K] and incoming gradient grad_output [.., N]::

    output      = alpha_output      · x @ w.T             [.., N]
    grad_input  = alpha_grad_input  · grad_output @ w     [.., K]
    grad_weight = alpha_grad_weight · grad_output.T @ x   [N, K]

In FP8 each operand of each GEMM is quantised as its :class:`~fp8train.numerics.quant_spec.QuantSpec` says,
and backward keeps FP8 payloads, not BF16 inputs: half the activation memory. The weight is quantised once per
optimizer step (keyed by the parameter's storage and version), not once per micro-batch. Dimensions that are
not multiples of 16 are padded with zeros after amax was taken, so padding changes no value.

The weight gradient does not go to ``.grad`` but to a :class:`~fp8train.numerics.grad_sink.GradSink`, through
a custom operator that receives the operands and lets the sink decide when to multiply. Without a sink (a
layer used alone) it is returned to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp8train.kernels.gemm import ALIGNMENT, GemmBackend, fp8_gemm
from fp8train.kernels.matmul import matmul
from fp8train.numerics.cast import quantize, uncast
from fp8train.numerics.grad_sink import find_sink
from fp8train.numerics.quant_spec import LinearQuant, QuantSpec
from fp8train.numerics.statistics import CastRecorder, cast_statistics

Operand = tuple[Tensor, Tensor]  # (payload, scale_inv)


@dataclass(frozen=True)
class Alphas:
    """Multipliers of the three GEMMs; a parametrisation sets them, standard training leaves them at 1."""

    output: float = 1.0
    grad_input: float = 1.0
    grad_weight: float = 1.0


@dataclass(frozen=True)
class Fp8Plan:
    """How one linear runs in FP8: the quantisation of its operands and the GEMM implementation."""

    quant: LinearQuant
    backend: GemmBackend


@dataclass(frozen=True)
class SinkSlot:
    """A linear's place in a gradient sink.

    ``buffer`` is declared to the compiler as what the operator mutates. ``slot`` is a CPU tensor, not an int,
    so that blocks that differ only in their slots share one compiled graph.
    """

    sink: int
    slot: Tensor
    buffer: Tensor


@dataclass(frozen=True)
class _Call:
    """Everything of a forward call that is not a tensor, for the autograd function."""

    alphas: Alphas
    plan: Fp8Plan | None
    sink: int


def pad_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad a matrix (FP8 too: through its bytes) to [rows, columns]; itself if it has that shape."""
    if x.shape == (rows, columns):
        return x
    padding = (0, columns - x.shape[1], 0, rows - x.shape[0])
    if x.element_size() == 1:
        return F.pad(x.view(torch.uint8), padding).view(x.dtype)
    return F.pad(x, padding)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad_aligned(payload: Tensor) -> Tensor:
    return pad_to(payload, _aligned(payload.shape[0]), _aligned(payload.shape[1]))


def _multiply(
    plan: Fp8Plan,
    a: Operand,
    b: Operand,
    specs: tuple[QuantSpec, QuantSpec],
    alpha: float,
    dtype: torch.dtype,
    *,
    fast_accumulation: bool = False,
) -> Tensor:
    return fp8_gemm(
        a[0],
        b[0],
        a[1],
        b[1],
        alpha=alpha,
        power_of_two=specs[0].power_of_two and specs[1].power_of_two,
        out_dtype=dtype,
        backend=plan.backend.name,
        fast_accumulation=fast_accumulation,
    )


def _scaled(product: Tensor, alpha: float) -> Tensor:
    return product if alpha == 1.0 else product * alpha


@torch.library.custom_op("fp8train::contribute_grad_weight", mutates_args=("buffer",))
def contribute_grad_weight(
    grad_output: Tensor, x: Tensor, buffer: Tensor, slot: Tensor, sink: int, alpha: float
) -> None:
    """Hand ``alpha · grad_output.T @ x`` of a high-precision linear to its sink: [T, N], [T, K] -> [N, K]."""
    find_sink(sink).contribute(int(slot), lambda: _scaled(matmul(grad_output.t(), x), alpha))


@torch.library.custom_op("fp8train::contribute_grad_weight_fp8", mutates_args=("buffer",))
def contribute_grad_weight_fp8(
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
) -> None:
    """Hand the FP8 product ``alpha · grad_output.T @ x`` to its sink. Payloads are padded to 16s."""
    rows, columns = buffer.shape

    def compute() -> Tensor:
        product = fp8_gemm(
            grad_output.t(),
            x,
            grad_output_scale_inv,
            x_scale_inv,
            alpha=alpha,
            power_of_two=power_of_two,
            out_dtype=out_dtype,
            backend=backend,
        )
        return product[:rows, :columns]

    find_sink(sink).contribute(int(slot), compute)


class _HighPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, buffer: Tensor | None, slot: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.buffer, ctx.slot = buffer, slot  # not saved: other micro-batches change the buffer
        ctx.call = call
        return _scaled(matmul(x, weight.t()), call.alphas.output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        buffer, slot = ctx.buffer, ctx.slot
        call: _Call = ctx.call
        grad_output = grads[0]
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = _scaled(matmul(grad_output, weight), call.alphas.grad_input)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            if buffer is None:
                grad_weight = _scaled(matmul(grad_output.t(), x), call.alphas.grad_weight)
            else:
                contribute_grad_weight(grad_output, x, buffer, slot, call.sink, call.alphas.grad_weight)
        return grad_input, grad_weight, None, None, None


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        w_forward: Operand,
        w_backward: Operand | None,
        buffer: Tensor | None,
        slot: Tensor | None,
        x_row: Tensor | None,
        grad_row: Tensor | None,
        call: _Call,
    ) -> Tensor:
        assert call.plan is not None
        plan, quant = call.plan, call.plan.quant
        x_payload, x_scale_inv = _quantize_recorded(x, quant.output_x, x_row)
        x_operand = (_pad_aligned(x_payload), x_scale_inv)
        product = _multiply(
            plan,
            x_operand,
            (w_forward[0].t(), w_forward[1]),
            (quant.output_x, quant.output_w),
            call.alphas.output,
            x.dtype,
            fast_accumulation=quant.fast_accumulation,
        )
        kept_x: tuple[Tensor | None, Tensor | None]
        if quant.keep_x == "bf16":
            kept_x = (x, None)
        elif quant.keep_x == "second_copy":
            second, second_scale_inv = quantize(x, quant.grad_weight_x)
            kept_x = (_pad_aligned(second), second_scale_inv)
        else:
            kept_x = x_operand
        kept_w = (weight, None) if w_backward is None else w_backward
        ctx.save_for_backward(*kept_x, *kept_w)
        ctx.buffer, ctx.slot, ctx.grad_row = buffer, slot, grad_row
        ctx.call, ctx.shape, ctx.weight_shape = call, x.shape, weight.shape
        return product[: x.shape[0], : weight.shape[0]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale_inv, w, w_scale_inv = ctx.saved_tensors
        buffer, slot = ctx.buffer, ctx.slot
        call: _Call = ctx.call
        assert call.plan is not None
        plan, quant = call.plan, call.plan.quant
        grad_output = grads[0]
        payload, scale_inv = _quantize_recorded(grad_output, quant.grad_input_grad_output, ctx.grad_row)
        grad_operand = (_pad_aligned(payload), scale_inv)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            w_operand = _backward_operand(quant.keep_w, w, w_scale_inv, quant.grad_input_w)
            specs = (quant.grad_input_grad_output, quant.grad_input_w)
            product = _multiply(
                plan, grad_operand, w_operand, specs, call.alphas.grad_input, grad_output.dtype
            )
            grad_input = product[: ctx.shape[0], : ctx.shape[1]]
        if ctx.needs_input_grad[1]:
            if quant.grad_weight_grad_output != quant.grad_input_grad_output:
                second, second_scale_inv = quantize(grad_output, quant.grad_weight_grad_output)
                grad_operand = (_pad_aligned(second), second_scale_inv)
            x_operand = _backward_operand(quant.keep_x, x, x_scale_inv, quant.grad_weight_x)
            specs = (quant.grad_weight_grad_output, quant.grad_weight_x)
            if buffer is None:
                transposed = (grad_operand[0].t(), grad_operand[1])
                product = _multiply(
                    plan, transposed, x_operand, specs, call.alphas.grad_weight, grad_output.dtype
                )
                grad_weight = product[: ctx.weight_shape[0], : ctx.weight_shape[1]]
            else:
                contribute_grad_weight_fp8(
                    *grad_operand,
                    *x_operand,
                    buffer,
                    slot,
                    call.sink,
                    call.alphas.grad_weight,
                    specs[0].power_of_two and specs[1].power_of_two,
                    grad_output.dtype,
                    plan.backend.name,
                )
        return grad_input, grad_weight, None, None, None, None, None, None, None


def _quantize_recorded(source: Tensor, spec: QuantSpec, row: Tensor | None) -> Operand:
    """Quantise; ``row`` receives the cast's statistics."""
    payload, scale_inv = quantize(source, spec)
    if row is not None:
        row.copy_(cast_statistics(source, payload, scale_inv))
    return payload, scale_inv


def _backward_operand(keep: str, kept: Tensor, scale_inv: Tensor | None, backward: QuantSpec) -> Operand:
    """The backward GEMM's operand from what forward kept."""
    if scale_inv is None:
        payload, scale_inv = quantize(kept, backward)
        return _pad_aligned(payload), scale_inv
    if keep == "requantise":
        return quantize(uncast(kept, scale_inv), backward)
    return kept, scale_inv


class Linear(nn.Module):
    """``y = alpha_output · x @ weight.T + bias``.

    Attributes:
        weight: [out_features, in_features] in the compute dtype.
        bias: [out_features] or None.
        alphas: multipliers of the three GEMMs.
        plan: None in high precision, else how the GEMMs run in FP8. Set by :meth:`use_fp8`.
        sink_slot: where weight gradients go; None returns them to autograd.
        recorder: where cast statistics go; None keeps none. Set it after ``name``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
        alphas: Alphas = Alphas(),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.alphas = alphas
        self.name = "linear"
        self.plan: Fp8Plan | None = None
        self.sink_slot: SinkSlot | None = None
        self._recorder: CastRecorder | None = None
        self._rows: tuple[Tensor | None, Tensor | None] = (None, None)
        self._weight_key: tuple[int, int] | None = None
        self._w_forward: Operand | None = None
        self._w_backward: Operand | None = None

    @property
    def recorder(self) -> CastRecorder | None:
        """Where cast statistics go."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: CastRecorder | None) -> None:
        # Rows are looked up now and passed as tensors: by its name each linear would get a graph of its own.
        self._recorder = recorder
        if recorder is not None:
            self._rows = (recorder.row(f"{self.name}/x"), recorder.row(f"{self.name}/grad_output"))

    def use_fp8(self, plan: Fp8Plan) -> None:
        """Run all three GEMMs in FP8 from now on."""
        self.plan = plan
        self._weight_key = None

    @torch.no_grad()
    def quantize_weight(self) -> None:
        """Quantise the weight if it changed since the last time. The model calls it before its blocks run."""
        key = (self.weight.data_ptr(), self.weight._version)
        if self.plan is None or self._weight_key == key:
            return
        quant = self.plan.quant
        payload, scale_inv = quantize(self.weight, quant.output_w)
        self._w_forward = (_pad_aligned(payload), scale_inv)
        if quant.keep_w == "second_copy":
            second, second_scale_inv = quantize(self.weight, quant.grad_input_w)
            self._w_backward = (_pad_aligned(second), second_scale_inv)
        else:  # requantise: backward recasts the forward's payload, nothing more is stored
            self._w_backward = None if quant.keep_w == "bf16" else self._w_forward
        self._weight_key = key
        if self.recorder is not None and self.recorder.active:
            self.recorder.record(f"{self.name}/w", self.weight, payload, scale_inv)

    def record_weight(self) -> None:
        """Write the statistics of the weight's current FP8 copy (it is cast once a step, which need not be
        this forward).
        """
        if self.plan is not None and self.recorder is not None and self.recorder.active:
            assert self._w_forward is not None
            payload, scale_inv = self._w_forward
            self.recorder.record(
                f"{self.name}/w", self.weight, payload[: self.out_features, : self.in_features], scale_inv
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [.., in_features] -> [.., out_features]."""
        if not torch.compiler.is_compiling():
            self.quantize_weight()
        slot = self.sink_slot
        call = _Call(self.alphas, self.plan, 0 if slot is None else slot.sink)
        flat = x.reshape(-1, self.in_features)
        buffer, index = (None, None) if slot is None else (slot.buffer, slot.slot)
        if self.plan is None:
            y = _HighPrecisionLinear.apply(flat, self.weight, buffer, index, call)
        else:
            assert self._w_forward is not None, (
                f"{self.name}: call quantize_weight() before a compiled forward"
            )
            rows = self._rows if self._recorder is not None and self._recorder.active else (None, None)
            operands = (self._w_forward, self._w_backward)
            y = _Fp8Linear.apply(flat, self.weight, *operands, buffer, index, *rows, call)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        before = self.weight.dtype
        probe = fn(torch.empty(0, dtype=before, device=self.weight.device))
        if self.plan is not None and probe.dtype != before:
            raise TypeError(
                f"{self.name} runs in FP8 with {before} weights; converting it to {probe.dtype} "
                "would silently change its numerics. Build the model with another precision.compute instead"
            )
        self._weight_key = None
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Shape and live recipe, for ``print(model)``."""
        precision = (
            str(self.weight.dtype).removeprefix("torch.") if self.plan is None else f"fp8[{self.plan.quant}]"
        )
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}, {precision}"
