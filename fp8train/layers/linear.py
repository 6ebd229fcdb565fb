"""The linear layer and its three GEMMs, in high precision or FP8.

With input x [.., K], weight w [N, K] and incoming gradient grad_output [.., N]::

    output      = alpha_output      · x @ w.T             [.., N]
    grad_input  = alpha_grad_input  · grad_output @ w     [.., K]
    grad_weight = alpha_grad_weight · grad_output.T @ x   [N, K]

In FP8 the operands are quantised as the layer's plan says (:mod:`fp8train.layers.fp8_linear`), the weight
once per optimizer step and not once per micro-batch. It can even exist in FP8 alone
(:meth:`Linear.hold_fp8_weight`).

The weight gradient does not go to ``.grad`` but to a :class:`~fp8train.numerics.grad_sink.GradSink`, through
an operator that lets the sink decide when to multiply (:mod:`fp8train.layers.grad_weight_op`). Without a sink
(a layer used alone) it is returned to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.kernels.matmul import matmul
from fp8train.layers.factors import scale_backward
from fp8train.layers.fp8_linear import CastSlots, StatisticsRows, fp8_linear
from fp8train.layers.fp8_operand import Operand
from fp8train.layers.fp8_weight import CachedFp8Weight, Fp8Weight, LoadedFp8Weight, ResidentFp8Weight
from fp8train.layers.grad_weight_op import SinkSlot, contribute_grad_weight
from fp8train.layers.linear_plan import Alphas, Fp8Plan, LinearCall
from fp8train.layers.wire import UNSPLIT, Wire
from fp8train.numerics.quant_spec import QuantSpec
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
        whole = call.wire.gather_input(x, call.batch)()
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
            product = matmul(grad_output, weight, alpha=call.alphas.grad_input)
            grad_input = call.wire.scatter_grad_input(product, call.batch, fp8=False)
        grad_weight = None
        if whole is not None:
            x = whole()
            if buffer is None:
                grad_weight = matmul(grad_output.t(), x, alpha=call.alphas.grad_weight)
            else:
                contribute_grad_weight(grad_output, x, buffer, slot, call.sink, call.alphas.grad_weight)
        result = None if grad_input is None else grad_input()
        return result, grad_weight, None, None, None


class Linear(nn.Module):
    """``y = alpha_output · x @ weight.T + bias``.

    Attributes:
        weight: [out_features, in_features] in the compute dtype. Without values of its own once
            :meth:`hold_fp8_weight` was called.
        bias: [out_features] or None.
        alphas: multipliers of the three GEMMs.
        plan: None in high precision, else how the GEMMs run in FP8. Set by :meth:`use_fp8`.
        sink_slot: where weight gradients go; None returns them to autograd.
        wire: how the weight is cut over tensor-parallel ranks, and what travels for it. ``in_features``,
            ``out_features`` and ``weight`` are this rank's.
        recorder: where cast statistics go; None keeps none. Set it after ``name``.
        casts_in_forward: cast the weight in every forward, times factors per column. Set by
            :meth:`cast_weight_in_forward`.
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
        alphas: Alphas = _STANDARD,
        wire: Wire = UNSPLIT,
    ) -> None:
        super().__init__()
        self.wire = wire
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.alphas = alphas
        self.name = "linear"
        self.plan: Fp8Plan | None = None
        self.leaves_fp8 = False
        self.casts_in_forward = False
        self.sink_slot: SinkSlot | None = None
        self._recorder: CastRecorder | None = None
        self._scale_state: ScaleState | None = None
        self._fp8_weight: Fp8Weight | None = None
        self._rows = StatisticsRows()
        self._slots = self._recording_slots = CastSlots()

    @property
    def recorder(self) -> CastRecorder | None:
        """Where cast statistics go."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: CastRecorder | None) -> None:
        self._recorder = recorder
        self._connect()

    @property
    def fp8_weight_is_resident(self) -> bool:
        """Whether the FP8 copies are all there is of the weight."""
        return isinstance(self._fp8_weight, (ResidentFp8Weight, LoadedFp8Weight))

    def fp8_codes(self) -> Tensor:
        """The FP8 weight of the output GEMM as it is stored, padding included; once it was written."""
        self.await_weight()
        assert self._w_forward is not None
        return self._w_forward[0]

    def fp8_scale_inv(self) -> Tensor:
        """Its scales, FP32: a scalar, or those of rows or blocks."""
        assert self._w_forward is not None
        return self._w_forward[1]

    @property
    def _w_forward(self) -> Operand | None:
        return None if self._fp8_weight is None else self._fp8_weight.forward

    @property
    def _w_backward(self) -> Operand | None:
        return None if self._fp8_weight is None else self._fp8_weight.backward

    def use_fp8(self, plan: Fp8Plan) -> None:
        """Run all three GEMMs in FP8 from now on; delayed scales need :meth:`use_scale_state` too."""
        assert not self.fp8_weight_is_resident, (
            f"{self.name}: its weight exists in FP8 as another plan made it"
        )
        self.plan = plan
        self._fp8_weight = CachedFp8Weight(plan.quant, self.weight.shape, self.weight.device)
        self._fp8_weight.wire = self.wire
        self._connect()

    def cast_weight_in_forward(self) -> None:
        """Cast the weight in every forward from now on, multiplied by that call's ``columns``, and keep no
        FP8 copy beyond backward."""
        assert self.plan is not None and not self.fp8_weight_is_resident, f"{self.name}: call use_fp8() first"
        self.casts_in_forward, self._fp8_weight = True, None
        self._connect()

    @property
    def weight_bytes(self) -> int:
        """What the weight takes as the GEMMs read it: the parameter's values, and its FP8 copies."""
        own = 0 if self.fp8_weight_is_resident else self.weight.nbytes
        return own + (0 if self._fp8_weight is None else self._fp8_weight.nbytes)

    def scale_slots(self) -> dict[str, QuantSpec]:
        """``{slot name: spec}`` of the delayed casts, ``{self.name}/{use}``: what a
        :class:`~fp8train.numerics.scale_state.ScaleState` is made of."""
        casts = {} if self.plan is None else self.plan.quant.casts()
        return {f"{self.name}/{use}": spec for use, spec in casts.items() if spec.scale_source == "delayed"}

    def use_scale_state(self, state: ScaleState) -> None:
        """Take delayed scales from ``state``, which has the slots of :meth:`scale_slots`."""
        self._scale_state = state
        if isinstance(self._fp8_weight, CachedFp8Weight):
            self._fp8_weight.forget()
        self._connect()

    def hold_fp8_weight(self) -> ResidentFp8Weight:
        """Keep the weight in FP8 alone from now on: drop its values, allocate the FP8 copies.

        ``weight`` keeps its name, shape, dtype and ``requires_grad``, so gradients and optimizer find it, but
        all its elements are one stored NaN: reading it by mistake poisons the result, copying into it raises.
        :meth:`dequantized_weight` gives the values. Nothing can run before the first weight is written.

        Returns:
            what the optimizer writes new weights to.

        Raises:
            ValueError: the plan keeps the weight in BF16 for backward, or gives its rows or blocks scales of
                their own.
        """
        assert self.plan is not None, f"{self.name}: call use_fp8() first"
        resident = ResidentFp8Weight(self.plan.quant, self.weight.shape, self.weight.device)
        self._fp8_weight = resident
        self._drop_values()
        self._connect()
        return resident

    def load_fp8_weight(self, values: Tensor) -> None:
        """For a model that only runs forward: cast ``values`` [out_features, in_features] once and keep
        nothing else, as :meth:`hold_fp8_weight`. Needs the scale state first where scales are delayed."""
        assert self.plan is not None, f"{self.name}: call use_fp8() first"
        loaded = LoadedFp8Weight(self.plan.quant, self.weight.shape, self.weight.device)
        self._fp8_weight = loaded
        self._drop_values()
        self._connect()
        loaded.load(values)

    def _drop_values(self) -> None:
        one = torch.full((1, 1), torch.nan, dtype=self.weight.dtype, device=self.weight.device)
        self.weight.data = one.expand(self.weight.shape)

    def _connect(self) -> None:
        """Look up statistics rows and scale slots: forward passes them as tensors. By its name each linear
        would get a compiled graph of its own."""
        recorder, state, weight = self._recorder, self._scale_state, self._fp8_weight
        if recorder is not None:
            self._rows = StatisticsRows(
                recorder.row(f"{self.name}/x"),
                recorder.row(f"{self.name}/grad_output"),
                recorder.row(f"{self.name}/w") if self.casts_in_forward else None,
            )
        if weight is not None:
            weight.recorder = None if recorder is None else (recorder, f"{self.name}/w")
        if state is None:
            return
        uses = [name.removeprefix(f"{self.name}/") for name in self.scale_slots()]
        quiet, recording = (
            {use: state.slot(f"{self.name}/{use}", record=record) for use in uses} for record in (False, True)
        )
        self._slots, self._recording_slots = _cast_slots(quiet), _cast_slots(recording)
        if weight is not None:
            weight.slots = recording

    @torch.no_grad()
    def quantize_weight(self) -> None:
        """Quantise the weight if it changed since the last time, and record its amax if amaxes are recorded.

        The model calls it before its blocks run.
        """
        assert self._scale_state is not None or not self.scale_slots(), (
            f"{self.name} has delayed scales but no scale state; call use_scale_state()"
        )
        if isinstance(self._fp8_weight, CachedFp8Weight):
            self._fp8_weight.refresh(self.weight)
        if self._fp8_weight is not None and self._scale_state is not None and self._scale_state.active:
            self._fp8_weight.record_amax()

    def await_weight(self) -> None:
        """Wait until all of a new FP8 weight has arrived from the ranks that keep its master."""
        if self._fp8_weight is not None and self._fp8_weight.ready is not None:
            self._fp8_weight.ready()

    @torch.no_grad()
    def record_weight(self) -> None:
        """Write the statistics of the weight's current FP8 copy (it is cast once a step, which need not be
        this forward). A weight resident in FP8 writes them when it is written.
        """
        if isinstance(self._fp8_weight, CachedFp8Weight):
            self._fp8_weight.record_statistics(self.weight)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values that the output GEMM multiplies.

        Args:
            dtype: of the result; by default the compute dtype.

        Returns:
            [out_features, in_features].
        """
        if self._fp8_weight is None:
            return self.weight.detach().to(dtype or self.weight.dtype)
        self.quantize_weight()
        return self._fp8_weight.dequantized(dtype or self.weight.dtype)

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """Shapes: x [.., in_features] -> [.., out_features]. With tensor parallelism x is [B, S,
        in_features], where column-parallel linears take a part of S and row-parallel ones return a part of
        it. ``columns``, powers of two [in_features] that the weight is multiplied by before its cast, are
        given where ``casts_in_forward``, and nowhere else."""
        assert (columns is not None) == (self.casts_in_forward and not self.leaves_fp8), (
            f"{self.name}: columns belong to a weight that is cast in forward"
        )
        if not torch.compiler.is_compiling():
            self.quantize_weight()
            self.await_weight()
        slot = self.sink_slot
        batch = 1 if self.wire.kind == "none" else x.shape[0]
        call = LinearCall(self.alphas, self.plan, 0 if slot is None else slot.sink, self.wire, batch)
        flat = x.reshape(-1, self.in_features)
        if self.plan is None or self.leaves_fp8:
            buffer, index = (None, None) if slot is None else (slot.buffer, slot.slot)
            y = _HighPrecisionLinear.apply(flat, self.weight, buffer, index, call)
        else:
            w_forward, w_backward = self._w_forward, self._w_backward
            assert w_forward is not None or columns is not None, (
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
                "would silently change its numerics. Build the model with another precision.compute instead"
            )
        super()._apply(fn, recurse)
        if isinstance(self._fp8_weight, CachedFp8Weight):
            self._fp8_weight.forget()
        elif isinstance(self._fp8_weight, (ResidentFp8Weight, LoadedFp8Weight)):
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


def _cast_slots(slots: Mapping[str, ScaleSlot]) -> CastSlots:
    """The slots that forward and backward use, from ``{use: slot}`` of all."""
    fields = {use.replace(".", "_"): slot for use, slot in slots.items()}
    return CastSlots(**{name: slot for name, slot in fields.items() if name in CastSlots._fields})
