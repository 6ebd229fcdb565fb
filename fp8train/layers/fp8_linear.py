"""A linear's forward and backward with FP8 operands, as one autograd function.

Each operand of each GEMM is quantised as its :class:`~fp8train.precision.operand_cast.QuantSpec` says, and
backward keeps FP8 payloads, not BF16 inputs: half the activation memory. The weight arrives quantised, once
per optimizer step (:mod:`fp8train.layers.fp8_weight`), or is cast here
(:mod:`fp8train.layers.weight_in_forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.matmul import matmul
from fp8train.kernels.padding import Operand, padded
from fp8train.layers.fp8_operand import (
    Layouts,
    Measured,
    quantize_kept,
    quantize_layouts,
    quantize_matrix,
    quantize_twice,
    transposed,
)
from fp8train.layers.grad_weight_op import (
    SinkSlot,
    contribute_grad_weight,
    contribute_grad_weight_fp8,
)
from fp8train.layers.linear_plan import Fp8Plan, LinearCall
from fp8train.layers.weight_in_forward import cast_again, cast_at_use, cast_in_forward
from fp8train.layers.wire import OperandName
from fp8train.numerics.cast import uncast
from fp8train.numerics.granularity import expand_scales
from fp8train.numerics.scale_state import ScaleSlot
from fp8train.precision.linear_gemms import Keep, LinearQuant
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import scale_tile


class CastSlots(NamedTuple):
    """Scale slots of the casts that happen in forward and backward; None where the scale is not delayed."""

    output_x: ScaleSlot | None = None
    output_w: ScaleSlot | None = None
    grad_input_grad_output: ScaleSlot | None = None
    grad_input_w: ScaleSlot | None = None
    grad_weight_grad_output: ScaleSlot | None = None
    grad_weight_x: ScaleSlot | None = None


class StatisticsRows(NamedTuple):
    """Rows for cast statistics; None on steps that are not sampled."""

    x: Tensor | None = None
    grad_output: Tensor | None = None
    w: Tensor | None = None


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    operands: tuple[Operand | None, Operand | None],
    sink_slot: SinkSlot | None,
    slots: CastSlots,
    rows: StatisticsRows,
    call: LinearCall,
    columns: Tensor | None = None,
) -> Tensor:
    """``alpha_output · x @ (weight · columns).T`` in FP8, with FP8 GEMMs in backward.

    With tensor parallelism x or the output are parts of sequences, as :mod:`fp8train.layers.wire` says; T
    counts their tokens.

    Args:
        x: [T, K] in the compute dtype.
        weight: [N, K]; tells autograd where the gradient belongs. Its values are not read unless they are
            cast here, or backward keeps them in high precision.
        operands: the quantised weight of the output and the grad_input GEMM; None for the second if backward
            casts ``weight``, for both if forward casts it.
        sink_slot: where the weight gradient goes; None returns it to autograd.
        slots: delayed scales of the casts.
        rows: where statistics of the casts go.
        call: the rest.
        columns: [K] powers of two that the weight is multiplied by before it is cast, here and now; they are
            constants. None: 1, and the weight arrives quantised.

    Returns:
        [T, N] in x's dtype.
    """
    buffer, index = (None, None) if sink_slot is None else (sink_slot.buffer, sink_slot.slot)
    return _Fp8Linear.apply(x, weight, *operands, buffer, index, slots, rows, call, columns)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        w_forward: Operand | None,
        w_backward: Operand | None,
        buffer: Tensor | None,
        sink_slot: Tensor | None,
        slots: CastSlots,
        rows: StatisticsRows,
        call: LinearCall,
        columns: Tensor | None,
    ) -> Tensor:
        assert call.plan is not None
        quant, wire = call.plan.quant, call.wire
        # Operand w [N, K]: codes and scale that the layer's Fp8Weight made once for the step and owns, or
        # those of a weight that is cast here.
        measured: Measured | None = None
        if w_forward is None:
            values = weight.detach() if columns is None else weight.detach() * columns
            w_slots = slots.output_w, slots.grad_input_w
            if call.plan.holding == "at_use":
                w_forward, measured = cast_at_use(values, w_slots, rows.w, call)
            else:
                w_forward, w_backward = cast_in_forward(values, w_slots, rows.w, call)
        # Operand x [T, K], cast here for a GEMM that sums over K, and what GEMM grad_weight gets of it, which
        # sums over T.
        x_operand, tokens, kept_x = _input_operands(x, slots, rows.x, call)
        # GEMM output: x [T, K] · wᵀ [K, N] -> [T, N]; both are padded to multiples of 16, cut off again.
        product = _multiply(
            call.plan,
            x_operand,
            transposed(w_forward),
            (quant.output_x, quant.output_w),
            call.alphas.output,
            x.dtype,
            fast_accumulation=quant.fast_accumulation,
        )[:tokens, : weight.shape[0]]
        # Kept for GEMM grad_input, which sums over N: codes of the Fp8Weight, not copied, or the weight, as
        # the parameter that it is: whoever takes its values away between forward and backward brings them
        # back there.
        kept_w = (weight, None) if w_backward is None else w_backward
        ctx.save_for_backward(*kept_x, *kept_w, columns, *(measured or (None, None)))
        # Not saved: other micro-batches change what these hold.
        ctx.buffer, ctx.sink_slot, ctx.slots, ctx.grad_row = buffer, sink_slot, slots, rows.grad_output
        ctx.call, ctx.shape, ctx.weight_shape = call, (tokens, x.shape[1]), weight.shape
        # Row-parallel: [T, N] are partial sums over K; ranks send each other parts (FP8 or the compute type),
        # add them, and keep their own tokens [T/tp, N].
        return wire.scatter_output(product, call.batch, fp8=True)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_scale_inv, w, w_scale_inv, columns, *measured = ctx.saved_tensors
        call: LinearCall = ctx.call
        slots: CastSlots = ctx.slots
        assert call.plan is not None
        quant, wire = call.plan.quant, call.wire
        # grad_output: this rank's tokens of a row-parallel linear, else [T, N]. Gathered here in high
        # precision, or as codes after each cast.
        grad_output = grads[0]
        if not wire.grad_output_in_fp8:
            grad_output = wire.gather_grad_output(grad_output, call.batch)()
        finish_grad_weight = None
        if ctx.needs_input_grad[1]:  # posted first: it arrives while grad_input is multiplied
            finish_grad_weight = _start_grad_weight(ctx, (x, x_scale_inv), grad_output, columns)
        # Operand grad_output [T, N], cast for a GEMM that sums over N; for grad_weight, which sums over T, as
        # well where one cast serves both or one read makes both.
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        for_input, for_weight = _grad_operands(grad_output, slots, ctx.grad_row, call, needed)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            if columns is not None and w_scale_inv is None:
                w = w * columns
            # Operand w [N, K]: the forward's codes or their second copy, kept or made again; keep_w may have
            # them, or the values, cast anew here.
            if call.plan.holding == "at_use" and quant.keep_w != "bf16":
                known = None if measured[0] is None else Measured(*measured)
                w, w_scale_inv = cast_again(w, known, (slots.output_w, slots.grad_input_w), call)
            w_operand = _backward_operand("w", w, w_scale_inv, slots, call)
            # GEMM grad_input: grad_output [T, N] · w [N, K] -> [T, K].
            specs = (quant.grad_input_grad_output, quant.grad_input_w)
            product = _multiply(
                call.plan, for_input, w_operand, specs, call.alphas.grad_input, grad_output.dtype
            )
            product = product[: ctx.shape[0], : ctx.shape[1]]
            # Column-parallel: partial sums over N; sent now, waited for below, after grad_weight.
            grad_input = wire.scatter_grad_input(product, call.batch, fp8=True)
        if finish_grad_weight is not None:
            # GEMM grad_weight: grad_outputᵀ [N, T] · x [T, K] -> [N, K], this rank's shard. The sink (the
            # gradient store) takes it and decides when to multiply; without a sink autograd gets it.
            grad_weight = finish_grad_weight(for_weight)
        result = None if grad_input is None else grad_input()
        return result, grad_weight, None, None, None, None, None, None, None, None


def _input_operands(
    x: Tensor, slots: CastSlots, row: Tensor | None, call: LinearCall
) -> tuple[Operand, int, tuple[Tensor | None, Tensor | None]]:
    """The input as GEMM output reads it, its number of tokens, and what is kept of it for GEMM grad_weight.

    A current scale comes from the amax over all ranks that hold parts of what shares it, a delayed one from
    its slot. Column-parallel: ranks' tokens are gathered before the cast in the compute type, or after it as
    codes (1 byte an element); kept are this rank's (codes, or x itself), to be gathered again.
    """
    assert call.plan is not None
    quant, wire = call.plan.quant, call.wire
    spec, other = quant.output_x, quant.grad_weight_x
    if wire.input_in_fp8:
        local_x = _quantize("x", x, spec, slots.output_x, call, row, contracted=1)
        whole_x = _gathered(local_x, spec, 1, call)()
        operand, tokens = padded(whole_x), whole_x[0].shape[0]
        if quant.keep_x == "second_copy" and call.trains:
            return operand, tokens, _quantize("x", x, other, slots.grad_weight_x, call, contracted=0)
        return operand, tokens, (x, None) if quant.keep_x == "bf16" else local_x
    source = wire.gather_input(x, call.batch)()
    keep: Keep = "bf16" if wire.gathers_input else quant.keep_x
    agreements = wire.agreement("x", spec, 1), wire.agreement("x", other, 0)
    both = quantize_kept(
        source,
        keep,
        (spec, other),
        (slots.output_x, slots.grad_weight_x),
        row,
        agreements,
        trains=call.trains,
        caster=call.plan.caster,
    )
    return both.rows, source.shape[0], (x, None) if keep == "bf16" else both.columns


def _quantize(
    operand: OperandName,
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None,
    call: LinearCall,
    row: Tensor | None = None,
    *,
    contracted: int,
) -> Operand:
    """Quantise this rank's part of an operand with the scales of the whole."""
    agree = call.wire.agreement(operand, spec, contracted)
    return quantize_matrix(x, spec, slot, row, agree, contracted=contracted)


def _cast_columns(
    operand: OperandName,
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None,
    call: LinearCall,
    *,
    contracted: int,
) -> Operand:
    """Quantise x or w for a backward GEMM, which sums over its rows: column-major where GPUs want that."""
    assert call.plan is not None
    agree = call.wire.agreement(operand, spec, contracted)
    caster = call.plan.caster
    return quantize_layouts(
        x, spec, slot, None, agree, contracted=contracted, rows=False, caster=caster
    ).columns


def _scales_travel(spec: QuantSpec, contracted: int) -> bool:
    """Whether tokens have scales of their own, so that other ranks' tokens have others."""
    return scale_tile(spec.granularity, contracted)[0] is not None


def _gathered(operand: Operand, spec: QuantSpec, contracted: int, call: LinearCall) -> Callable[[], Operand]:
    """Start to gather a column-parallel input's FP8 codes, and scales where those of ranks differ."""
    payload, scale_inv = operand
    wait = call.wire.gather_input(payload, call.batch)
    if not _scales_travel(spec, contracted):
        return lambda: (wait(), scale_inv)
    wait_scales = call.wire.gather_input(scale_inv, call.batch)
    return lambda: (wait(), wait_scales())


def _grad_operands(
    grad_output: Tensor, slots: CastSlots, row: Tensor | None, call: LinearCall, needed: tuple[bool, bool]
) -> tuple[Operand, Operand | None]:
    """Quantise the output gradient for the GEMMs of grad_input and grad_weight, as far as ``needed``; None
    for the second if it has to cast on its own."""
    assert call.plan is not None
    quant, wire = call.plan.quant, call.wire
    spec, other = quant.grad_input_grad_output, quant.grad_weight_grad_output
    if all(needed) and quant.grad_weight_fp8 and not wire.grad_output_in_fp8:
        agreements = wire.agreement("grad_output", spec, 1), wire.agreement("grad_output", other, 0)
        both = quantize_twice(grad_output, (spec, other), row, agreements, call.plan.caster)
        if both is not None:
            return both
    columns = quant.shares_grad_output and quant.grad_weight_fp8 and needed[1]
    wanted = {"rows": needed[0] or not columns, "columns": columns}
    layouts = _grad_operand(
        grad_output, spec, slots.grad_input_grad_output, call, row, contracted=1, **wanted
    )
    return layouts.rows, layouts.columns if columns else None


def _grad_operand(
    grad_output: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None,
    call: LinearCall,
    row: Tensor | None = None,
    *,
    contracted: int,
    rows: bool,
    columns: bool,
) -> Layouts:
    """Quantise the output gradient; a row-parallel linear's part is gathered in FP8 if traffic says so."""
    assert call.plan is not None
    wire = call.wire
    if not wire.grad_output_in_fp8:
        agree = wire.agreement("grad_output", spec, contracted)
        return quantize_layouts(
            *(grad_output, spec, slot, row, agree),
            contracted=contracted,
            rows=rows,
            columns=columns,
            caster=call.plan.caster,
        )
    payload, scale_inv = _quantize("grad_output", grad_output, spec, slot, call, row, contracted=contracted)
    payload = wire.gather_grad_output(payload, call.batch)()
    if _scales_travel(spec, contracted):
        scale_inv = wire.gather_grad_output(scale_inv, call.batch)()
    operand = padded((payload, scale_inv))
    return Layouts(operand, operand)


def _start_grad_weight(
    ctx: Any, kept_x: tuple[Tensor, Tensor | None], grad_output: Tensor, columns: Tensor | None
) -> Callable[[Operand | None], Tensor | None]:
    """Start to gather the input. The function that is returned takes the gradient's operand, if it was made
    together with grad_input's, and gives the weight gradient, or None if it went to the sink."""
    call: LinearCall = ctx.call
    slots: CastSlots = ctx.slots
    assert call.plan is not None
    quant = call.plan.quant
    if not quant.grad_weight_fp8:
        assert not call.wire.grad_output_in_fp8, "this GEMM needs all of grad_output in high precision"
        wait = call.wire.gather_input(kept_x[0], call.batch)
        return lambda _: _grad_weight_in_high_precision(ctx, grad_output, wait(), columns)
    x_operand = _start_grad_weight_x(kept_x, quant, slots, call)

    def finish(grad_operand: Operand | None) -> Tensor | None:
        if grad_operand is None:  # a cast of its own, for a GEMM that sums over T
            spec, slot = quant.grad_weight_grad_output, slots.grad_weight_grad_output
            layouts = _grad_operand(grad_output, spec, slot, call, contracted=0, rows=False, columns=True)
            grad_operand = layouts.columns
        return _grad_weight(ctx, grad_operand, x_operand(), columns, grad_output.dtype)

    return finish


def _start_grad_weight_x(
    kept: tuple[Tensor, Tensor | None], quant: LinearQuant, slots: CastSlots, call: LinearCall
) -> Callable[[], Operand]:
    """The grad_weight GEMM's input from what forward kept, after a gather that starts now."""
    wire, (x, scale_inv) = call.wire, kept
    if not wire.gathers_input:  # all tokens are here
        operand = _backward_operand("x", x, scale_inv, slots, call)
        return lambda: operand
    if not wire.input_in_fp8:  # forward kept x [T/tp, K] in high precision: gathered and cast again
        return lambda: _recast_x(wire.gather_input(x, call.batch)(), quant, slots, call)
    if scale_inv is None:  # keep_x: bf16: this rank's tokens are cast now and gathered as codes
        part = _quantize("x", x, quant.grad_weight_x, slots.grad_weight_x, call, contracted=0)
        arrived = _gathered(part, quant.grad_weight_x, 0, call)
        return lambda: padded(arrived())
    if quant.keep_x == "second_copy":  # codes as forward cast them, gathered as they are
        arrived = _gathered((x, scale_inv), quant.grad_weight_x, 0, call)
    else:
        arrived = _gathered((x, scale_inv), quant.output_x, 1, call)
    return lambda: _backward_operand("x", *arrived(), slots, call)


def _recast_x(x: Tensor, quant: LinearQuant, slots: CastSlots, call: LinearCall) -> Operand:
    """The operand that forward made of ``x`` or keeps beside it, made again after a high-precision gather."""
    if quant.keep_x == "same":
        return _cast_columns("x", x, quant.output_x, slots.output_x, call, contracted=1)
    if quant.keep_x == "requantise":
        operand = _quantize("x", x, quant.output_x, slots.output_x, call, contracted=1)
        return _backward_operand("x", *operand, slots, call)
    return _cast_columns("x", x, quant.grad_weight_x, slots.grad_weight_x, call, contracted=0)


def _grad_weight(
    ctx: Any, grad_operand: Operand, x_operand: Operand, columns: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The weight gradient; None if it went to the sink."""
    call: LinearCall = ctx.call
    assert call.plan is not None
    quant, alpha = call.plan.quant, call.alphas.grad_weight
    specs = (quant.grad_weight_grad_output, quant.grad_weight_x)
    if ctx.buffer is None:  # to autograd, padding cut off
        product = _multiply(call.plan, transposed(grad_operand), x_operand, specs, alpha, dtype)
        product = product[: ctx.weight_shape[0], : ctx.weight_shape[1]]
        return product if columns is None else product * columns
    # To the sink: an operator that hands over both operands, and with them the GEMM.
    contribute_grad_weight_fp8(
        *grad_operand,
        *x_operand,
        ctx.buffer,
        ctx.sink_slot,
        call.sink,
        alpha,
        specs[0].power_of_two and specs[1].power_of_two,
        dtype,
        call.plan.backend.name,
        columns,
    )
    return None


def _grad_weight_in_high_precision(
    ctx: Any, grad_output: Tensor, x: Tensor, columns: Tensor | None
) -> Tensor | None:
    """The same from unquantised operands: [T, N], [T, K]."""
    alpha = ctx.call.alphas.grad_weight
    if ctx.buffer is None:
        product = matmul(grad_output.t(), x, alpha=alpha)
        return product if columns is None else product * columns
    contribute_grad_weight(grad_output, x, ctx.buffer, ctx.sink_slot, ctx.call.sink, alpha, columns)
    return None


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


def _backward_operand(
    operand: Literal["x", "w"], kept: Tensor, scale_inv: Tensor | None, slots: CastSlots, call: LinearCall
) -> Operand:
    """The backward GEMM's operand from what forward kept. Backward contracts dimension 0 of both x and w."""
    assert call.plan is not None
    quant = call.plan.quant
    keep, backward, slot = quant.keep_w, quant.grad_input_w, slots.grad_input_w
    if operand == "x":
        keep, backward, slot = quant.keep_x, quant.grad_weight_x, slots.grad_weight_x
    if scale_inv is None:  # bf16: kept in high precision, cast now
        return _cast_columns(operand, kept, backward, slot, call, contracted=0)
    if keep == "requantise":  # kept as codes of the forward: decoded, and cast with the backward's scales
        values = uncast(kept, expand_scales(scale_inv, kept.shape))
        return _cast_columns(operand, values, backward, slot, call, contracted=0)
    return padded((kept, scale_inv))  # same, or second_copy: codes that serve as they are
