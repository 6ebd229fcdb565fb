"""The linear layer and its three GEMMs, in high precision or FP8.

With input x [.., K], weight w [N, K] and incoming gradient grad_output [.., N]::

    output      = alpha_output      · x @ w.T             [.., N]
    grad_input  = alpha_grad_input  · grad_output @ w     [.., K]
    grad_weight = alpha_grad_weight · grad_output.T @ x   [N, K]

In FP8 the operands are quantised as the layer's plan says (:mod:`fp8train.layers.fp8_linear`), the weight
once per optimizer step and not once per micro-batch. It can even exist in FP8 alone. What a linear of a model
runs with is handed to it once (:meth:`Linear.connect`, called by :mod:`fp8train.models.connect`).

The weight gradient does not go to ``.grad`` but to a :class:`~fp8train.numerics.grad_sink.GradSink`, through
an operator that lets the sink decide when to multiply (:mod:`fp8train.layers.grad_weight_op`). Without a sink
(a layer used alone) it is returned to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.kernels.matmul import matmul
from fp8train.kernels.padding import Operand
from fp8train.kernels.te.native import NativeLinear
from fp8train.layers.connection import cast_slots, contradiction, slots_by_use
from fp8train.layers.factors import scale_backward
from fp8train.layers.fp8_linear import CastSlots, StatisticsRows, fp8_linear
from fp8train.layers.fp8_weight import (
    FP8_WEIGHTS,
    CachedFp8Weight,
    Fp8Weight,
    LoadedFp8Weight,
    ResidentFp8Weight,
)
from fp8train.layers.fused_linear import FusedLinear, fusable
from fp8train.layers.grad_weight_op import SinkSlot, contribute_grad_weight
from fp8train.layers.linear_plan import Alphas, Fp8Plan, LinearCall
from fp8train.layers.wire import UNSPLIT, Wire
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.grad_sink import find_sink
from fp8train.numerics.scale_state import ScaleSlot, ScaleState
from fp8train.numerics.statistics import CastRecorder

__all__ = ["Alphas", "Fp8Plan", "Linear", "SinkSlot"]

_STANDARD = Alphas()


class _HighPrecisionLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, buffer: Tensor | None, slot: Tensor | None, call: LinearCall
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.buffer, ctx.slot = buffer, slot  # not saved: other micro-batches change the buffer
        ctx.call = call
        whole = call.wire.gather_input(x, call.batch)()  # column-parallel: all tokens; else x itself
        # GEMM output: x [T, K] · wᵀ [K, N] -> [T, N].
        y = matmul(whole, weight.t(), alpha=call.alphas.output)
        return call.wire.scatter_output(y, call.batch, fp8=False)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        buffer, slot = ctx.buffer, ctx.slot
        call: LinearCall = ctx.call
        grad_output = call.wire.gather_grad_output(grads[0], call.batch)()
        whole = call.wire.gather_input(x, call.batch) if ctx.needs_input_grad[1] else None
        grad_input = None
        if ctx.needs_input_grad[0]:
            # GEMM grad_input: grad_output [T, N] · w [N, K] -> [T, K].
            product = matmul(grad_output, weight, alpha=call.alphas.grad_input)
            grad_input = call.wire.scatter_grad_input(product, call.batch, fp8=False)
        grad_weight = None
        if whole is not None:
            # GEMM grad_weight: grad_outputᵀ [N, T] · x [T, K] -> [N, K], to autograd or to the sink.
            x = whole()
            if buffer is None:
                grad_weight = matmul(grad_output.t(), x, alpha=call.alphas.grad_weight)
            else:
                contribute_grad_weight(grad_output, x, buffer, slot, call.sink, call.alphas.grad_weight)
        result = None if grad_input is None else grad_input()
        return result, grad_weight, None, None, None


class Linear(nn.Module):
    """A linear layer, ``y = alpha_output · x @ weight.T + bias``, in high precision or FP8.

    As it is constructed it multiplies in high precision and returns its weight gradient to autograd.
    Everything else is decided before its first use, in one call: :meth:`connect`.

    Attributes:
        name: its path in the model; scale slots and statistics are named after it.
        weight: [out_features, in_features] in the compute dtype. Without values of its own if it exists in
            FP8 alone.
        bias: [out_features] or None.
        alphas: multipliers of the three GEMMs.
        wire: how the weight is cut over tensor-parallel ranks, and what travels for it. ``in_features``,
            ``out_features`` and ``weight`` are this rank's.
        plan: None in high precision, else how the GEMMs run in FP8.
        sink_slot: where weight gradients go; None returns them to autograd.
        leaves_fp8: multiply in the compute type for now although there is a plan; needs ``weight`` with
            values, and no delayed scales, whose history would have a hole.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
        name: str = "linear",
        alphas: Alphas = _STANDARD,
        wire: Wire = UNSPLIT,
    ) -> None:
        super().__init__()
        self.name, self.alphas, self.wire = name, alphas, wire
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.plan: Fp8Plan | None = None
        self.leaves_fp8 = False
        self.sink_slot: SinkSlot | None = None
        self._connected = False
        self._recorder: CastRecorder | None = None
        self._scale_state: ScaleState | None = None
        self._fp8_weight: Fp8Weight | None = None
        self._arrived: Callable[[], None] | None = None
        self._native: NativeLinear | None = None
        self._rows = StatisticsRows()
        self._quiet: dict[str, ScaleSlot] = {}
        self._slots = self._recording_slots = CastSlots()

    def make_fp8_weight(
        self, plan: Fp8Plan, *, scale_state: ScaleState | None, recorder: CastRecorder | None
    ) -> Fp8Weight | None:
        """The FP8 copies for :meth:`connect`, which come first because optimizer and ZeRO write into their
        memory. Changes nothing here. None if every forward casts the weight.

        Args:
            plan: as for :meth:`connect`, and so are the others.

        Raises:
            ValueError: the weight is to be resident, but the plan keeps it in BF16 for backward, or gives its
                rows or blocks scales of their own.
        """
        if plan.holding not in FP8_WEIGHTS:
            return None
        slots = slots_by_use(self.name, plan, scale_state, record=True)
        site = None if recorder is None else (recorder, f"{self.name}/w")
        kind, weight = FP8_WEIGHTS[plan.holding], self.weight
        where = weight.shape, weight.device
        return kind(plan.quant, *where, wire=self.wire, slots=slots, site=site, caster=plan.caster)

    def connect(
        self,
        *,
        plan: Fp8Plan | None = None,
        weight: Fp8Weight | None = None,
        scale_state: ScaleState | None = None,
        recorder: CastRecorder | None = None,
        sink_slot: SinkSlot | None = None,
        arrived: Callable[[], None] | None = None,
        native: bool = False,
    ) -> None:
        """Say how the layer runs and what it is connected to: once, before its first forward.

        A weight that exists in FP8 alone drops its values here. The parameter keeps its name, shape, dtype
        and ``requires_grad``, so gradients and optimizer find it, but all its elements are one stored NaN:
        reading it by mistake poisons the result, copying into it raises. :meth:`dequantized_weight` gives the
        values. Nothing can run before the first weight is written.

        Args:
            plan: all three GEMMs run in FP8, like this; None: in high precision.
            weight: the FP8 copies, from :meth:`make_fp8_weight` with the same plan, scale state and recorder.
            scale_state: has the slots of the plan's delayed casts
                (:func:`~fp8train.layers.linear_plan.scale_slots`); None without any.
            recorder: where statistics of casts go; None keeps none.
            sink_slot: where weight gradients go; None returns them to autograd.
            arrived: waits until all rows of a new resident weight are here, where other ranks write some.
            native: Transformer Engine's own linear multiplies, as its recipe says; without a plan.
        """
        assert not self._connected, f"{self.name} is connected already; a linear is connected once"
        problem = contradiction(plan, weight, self.weight.shape, recorder, sink_slot, arrived)
        assert problem is None, f"{self.name} {problem}"
        quiet, recording = (slots_by_use(self.name, plan, scale_state, record=r) for r in (False, True))
        self._connected = True
        self.plan, self.sink_slot = plan, sink_slot
        self._fp8_weight, self._arrived = weight, arrived
        if native:
            assert plan is None and self.wire.kind == "none", f"{self.name} multiplies elsewhere, whole"
            self._native = NativeLinear(self.weight, self._take_gradient)
        self._scale_state, self._recorder = scale_state, recorder
        if self.fp8_weight_is_resident:
            self._drop_values()
        # Forward passes rows and slots as tensors. By its name each linear would get a compiled graph of its
        # own.
        self._quiet = quiet
        self._slots, self._recording_slots = cast_slots(quiet), cast_slots(recording)
        if recorder is not None:
            self._rows = StatisticsRows(
                recorder.row(f"{self.name}/x"),
                recorder.row(f"{self.name}/grad_output"),
                recorder.row(f"{self.name}/w") if self.casts_in_forward else None,
            )

    @property
    def is_native(self) -> bool:
        """Whether Transformer Engine's own linear multiplies."""
        return self._native is not None

    def _take_gradient(self, gradient: Tensor) -> None:
        """Hand over a weight gradient that was not made here: to the sink, or to autograd's place."""
        if self.sink_slot is not None:
            find_sink(self.sink_slot.sink).contribute(int(self.sink_slot.slot), lambda: gradient)
        elif self.weight.grad is None:
            self.weight.grad = gradient
        else:
            self.weight.grad += gradient

    @property
    def casts_in_forward(self) -> bool:
        """Whether every forward casts the weight, and nothing keeps it in FP8."""
        return self.plan is not None and self.plan.holding not in FP8_WEIGHTS

    @property
    def fp8_weight_is_resident(self) -> bool:
        """Whether the FP8 copies are all there is of the weight."""
        return isinstance(self._fp8_weight, (ResidentFp8Weight, LoadedFp8Weight))

    def fp8_codes(self) -> Tensor:
        """The FP8 weight of the output GEMM, padding included, once it was written; the rounded values where
        FP4 is simulated."""
        self.quantize_weight()
        self.await_weight()
        assert self._w_forward is not None and self.plan is not None
        values, spec = self._w_forward[0], self.plan.quant.output_w
        return values if spec.is_nvfp4 else values.to(dtype_of(spec.format))  # exact where kept decoded

    def fp8_scale_inv(self) -> Tensor:
        """The FP32 scales of :meth:`fp8_codes`: a scalar, or those of rows or blocks."""
        self.quantize_weight()
        assert self._w_forward is not None
        return self._w_forward[1]

    def decode_weight(self) -> None:
        """Where a product would decode a loaded FP8 weight each time, decode it now, once:
        :meth:`~fp8train.layers.fp8_weight.LoadedFp8Weight.decode`. Results keep their bits."""
        if self.plan is None or self.plan.backend.name != "decode" or self.weight.device.type != "cpu":
            return
        if isinstance(self._fp8_weight, LoadedFp8Weight):
            self._fp8_weight.decode()

    @property
    def _w_forward(self) -> Operand | None:
        return None if self._fp8_weight is None else self._fp8_weight.forward

    @property
    def _w_backward(self) -> Operand | None:
        return None if self._fp8_weight is None else self._fp8_weight.backward_operand()

    @property
    def weight_bytes(self) -> int:
        """What the weight takes as the GEMMs read it: the parameter's values, and its FP8 copies."""
        own = 0 if self.fp8_weight_is_resident else self.weight.nbytes
        return own + (0 if self._fp8_weight is None else self._fp8_weight.nbytes)

    @property
    def weight_scale_bytes(self) -> int:
        """What of :attr:`weight_bytes` is scales."""
        return 0 if self._fp8_weight is None else self._fp8_weight.scale_bytes

    def _drop_values(self) -> None:
        one = torch.full((1, 1), torch.nan, dtype=self.weight.dtype, device=self.weight.device)
        self.weight.data = one.expand(self.weight.shape)

    def quantize_weight(self) -> None:
        """Quantise the weight if it changed since the last time, and record its amax if amaxes are recorded.

        The model calls it before its blocks run.
        """
        weight, trains = self._fp8_weight, torch.is_grad_enabled()
        with torch.no_grad():
            if isinstance(weight, CachedFp8Weight):
                weight.refresh(self.weight)
            elif isinstance(weight, ResidentFp8Weight):
                weight.refresh(turned=trains)
            if weight is not None and self._scale_state is not None and self._scale_state.active:
                weight.record_amax()

    def make_backward_operand(self) -> None:
        """Make what backward reads of a resident weight, if that is another layout: a compiled forward would
        make it in its graph, and another graph of the next forward, which finds it."""
        if self._fp8_weight is not None:
            self._fp8_weight.backward_operand()

    def forget_casts(self) -> None:
        """Make what is derived from the weight, and kept from forward to forward, again at its next use."""
        if self._fp8_weight is not None:
            self._fp8_weight.forget()
        if self._native is not None:
            self._native.forget()

    def await_weight(self) -> None:
        """Wait until all of a new FP8 weight has arrived from the ranks that keep its master."""
        if self._arrived is not None:
            self._arrived()

    @torch.no_grad()
    def record_weight(self) -> None:
        """Write the statistics of the weight's current FP8 copy (it is cast once a step, which need not be
        this forward). A weight resident in FP8 writes them when it is written.
        """
        if isinstance(self._fp8_weight, CachedFp8Weight):
            self._fp8_weight.record_statistics(self.weight)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight: the values that the output GEMM multiplies; without factors per column.

        Args:
            dtype: of the result; by default the compute dtype.

        Returns:
            [out_features, in_features].
        """
        if self.plan is not None and self.plan.holding == "at_use":
            copy = CachedFp8Weight(
                self.plan.quant, self.weight.shape, self.weight.device, wire=self.wire, slots=self._quiet
            )
            with torch.no_grad():
                copy.refresh(self.weight)
            return copy.dequantized(dtype or self.weight.dtype)
        if self._fp8_weight is None:
            return self.weight.detach().to(dtype or self.weight.dtype)
        self.quantize_weight()
        self.await_weight()
        return self._fp8_weight.dequantized(dtype or self.weight.dtype)

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """Shapes: x [.., in_features] -> [.., out_features]. With tensor parallelism x is [B, S,
        in_features], where column-parallel linears take a part of S and row-parallel ones return a part of
        it. ``columns``: powers of two [in_features] that the weight is multiplied by before its cast; only
        where ``casts_in_forward``, and always for a weight that is held ``in_forward``."""
        assert self._takes(columns), f"{self.name}: columns belong to a weight that is cast in forward"
        if not torch.compiler.is_compiling():
            self.quantize_weight()
            self.await_weight()
        slot = self.sink_slot
        batch = 1 if self.wire.kind == "none" else x.shape[0]
        sink, trains = 0 if slot is None else slot.sink, torch.is_grad_enabled()
        call = LinearCall(self.alphas, self.plan, sink, self.wire, batch, trains)
        flat = x.reshape(-1, self.in_features)
        if self._native is not None:
            y = self._native(flat, self.weight)
        elif self.plan is None or self.leaves_fp8:
            buffer, index = (None, None) if slot is None else (slot.buffer, slot.slot)
            y = _HighPrecisionLinear.apply(flat, self.weight, buffer, index, call)
        else:
            w_forward, w_backward = self._w_forward, self._w_backward if trains else None
            assert w_forward is not None or self.casts_in_forward, (
                f"{self.name}: no FP8 weight; call quantize_weight() before a compiled forward, or write the "
                "weight if it is resident in FP8"
            )
            state, recorder = self._scale_state, self._recorder
            slots = self._recording_slots if state is not None and state.active else self._slots
            rows = self._rows if recorder is not None and recorder.active else StatisticsRows()
            y = fp8_linear(flat, self.weight, (w_forward, w_backward), slot, slots, rows, call, columns)
        if self.bias is not None:
            y = y + scale_backward(self.bias, self.alphas.grad_bias)
        shape = x.shape[:-1] if self.wire.kind == "none" else (batch, -1)
        return y.view(*shape, self.out_features)

    def _takes(self, columns: Tensor | None) -> bool:
        if columns is not None:
            return self.casts_in_forward and not self.leaves_fp8
        return self.plan is None or self.plan.holding != "in_forward" or self.leaves_fp8

    @property
    def fuses(self) -> bool:
        """Whether this linear, once connected, can be a part of a fused function: not with a bias, ranks that
        hold other parts, other granularities of scales, or casts by others."""
        plan, alone = self.plan, self.bias is None and self.wire.kind == "none"
        casts_alike = plan is None or (
            not self.casts_in_forward and plan.caster is None and fusable(plan.quant)
        )
        return alone and self._native is None and casts_alike and self.weight.dtype != torch.float64

    def fused(self, *, keeps_input: bool = True) -> FusedLinear | None:
        """This linear as a part of a fused function; None where only :meth:`forward` does what it has to:
        unless it :attr:`fuses`, for statistics of casts, and while it leaves FP8.

        Args:
            keeps_input: see :class:`~fp8train.layers.fused_linear.FusedLinear`.
        """
        plan, state, recorder = self.plan, self._scale_state, self._recorder
        if not self.fuses or self.leaves_fp8 or (recorder is not None and recorder.active):
            return None
        sink, trains = 0 if self.sink_slot is None else self.sink_slot.sink, torch.is_grad_enabled()
        call = LinearCall(self.alphas, plan, sink, self.wire, trains=trains)
        slots = self._recording_slots if state is not None and state.active else self._slots
        shape, dtype = self.weight.shape, self.weight.dtype
        return FusedLinear(call, slots, self.sink_slot, shape, dtype, keeps_input)

    def fused_weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The operands of the output and the grad_input GEMM for :meth:`fused`: payload and scale of each;
        without a plan the weight and None. Without backward the second is not read."""
        if self.plan is None:
            return self.weight, None, self.weight, None
        self.quantize_weight()
        self.await_weight()
        forward, backward = self._w_forward, self._w_backward if torch.is_grad_enabled() else None
        assert forward is not None, f"{self.name}: no FP8 weight was written yet"
        return *forward, *(forward if backward is None else backward)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fp8_weight_is_resident:
            destination[prefix + "weight"] = self.dequantized_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        before = self.weight.dtype
        probe = fn(torch.empty(0, dtype=before, device=self.weight.device))
        if self.plan is not None and probe.dtype != before:
            raise TypeError(
                f"{self.name} runs in FP8 with {before} weights; converting it to {probe.dtype} "
                "would silently change its numerics. Build the model with another dtype instead"
            )
        super()._apply(fn, recurse)
        self.forget_casts()
        if isinstance(self._fp8_weight, (ResidentFp8Weight, LoadedFp8Weight)):
            self._fp8_weight.to(probe.device)
            self._drop_values()
        return self

    def extra_repr(self) -> str:
        """Shape and live recipe, for ``print(model)``."""
        precision = (
            str(self.weight.dtype).removeprefix("torch.") if self.plan is None else f"fp8[{self.plan.quant}]"
        )
        resident = ", weight resident in fp8" if self.fp8_weight_is_resident else ""
        split = "" if self.wire.kind == "none" else f", {self.wire.kind}-parallel"
        return (
            f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}, "
            f"{precision}{resident}{split}"
        )
