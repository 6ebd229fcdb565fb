"""The FP8 operands of a weight that forward casts: nobody keeps codes from step to step.

* ``in_forward``: times factors per column that are those of a micro-batch (:mod:`fp8train.layers.smooth`).
  The codes are kept for backward.
* ``at_use``: the parameter has values only around the forward and the backward of its module, as under
  ZeRO-3, where ranks keep a part of it in between. Codes that forward keeps would be whole on every rank, the
  memory that partitioning saves. So forward keeps the parameter itself, whose values are gathered again, and
  what its cast measured. Backward makes the same codes with the same scales: a cast more for each
  micro-batch, but neither another amax nor another agreement between ranks.

Codes are those that :mod:`fp8train.layers.fp8_weight` makes once a step, to the bit.
"""

from __future__ import annotations

from torch import Tensor

from fp8train.kernels.padding import Operand
from fp8train.layers.fp8_operand import Measured, measure, quantize_kept, quantize_layouts
from fp8train.layers.linear_plan import LinearCall
from fp8train.numerics.cast import amax_of
from fp8train.numerics.scale_state import ScaleSlot, record_amax
from fp8train.precision.operand_cast import QuantSpec

Slots = tuple[ScaleSlot | None, ScaleSlot | None]
"""Of the casts for the output and the grad_input GEMM; None where the scale is not delayed."""


def cast_in_forward(
    weight: Tensor, slots: Slots, row: Tensor | None, call: LinearCall
) -> tuple[Operand, Operand | None]:
    """The operands of the output and the grad_input GEMM; None for the second if backward casts the weight.

    Args:
        weight: [N, K], factors included.
        slots: of the two casts.
        row: receives the statistics of the first.
        call: the linear's.
    """
    assert call.plan is not None
    quant, wire = call.plan.quant, call.wire
    specs = quant.output_w, quant.grad_input_w
    agreements = wire.agreement("w", specs[0], 1), wire.agreement("w", specs[1], 0)
    both = quantize_kept(
        weight,
        quant.keep_w,
        specs,
        slots,
        row,
        agreements,
        trains=call.trains,
        caster=call.plan.caster,
    )
    return both.rows, None if quant.keep_w == "bf16" else both.columns


def cast_at_use(
    weight: Tensor, slots: Slots, row: Tensor | None, call: LinearCall
) -> tuple[Operand, Measured | None]:
    """The operand of the output GEMM, and what :func:`cast_again` has to know. Arguments as for
    :func:`cast_in_forward`."""
    assert call.plan is not None
    spec = call.plan.quant.output_w
    agree = call.wire.agreement("w", spec, 1)
    measured = measure(weight, spec, agree, contracted=1)
    layouts = quantize_layouts(
        weight, spec, slots[0], row, agree, contracted=1, columns=False, measured=measured
    )
    slot = slots[1]
    if call.trains and slot is not None and slot.amax is not None and _serves_both(call):
        assert measured is not None
        record_amax(amax_of(measured.amax), slot.amax)
    return layouts.rows, measured


def cast_again(weight: Tensor, measured: Measured | None, slots: Slots, call: LinearCall) -> Operand:
    """In backward: what forward would have kept, of the same values. Records no amax that forward recorded.

    Returns:
        With ``keep_w: requantise`` codes for the output GEMM, to be cast again; else the operand of the
        grad_input GEMM.
    """
    assert call.plan is not None
    quant, wire = call.plan.quant, call.wire
    if quant.keep_w == "second_copy":
        spec, agree = quant.grad_input_w, wire.agreement("w", quant.grad_input_w, 0)
        if not _serves_both(call):
            return quantize_layouts(weight, spec, slots[1], None, agree, contracted=0, rows=False).columns
        return quantize_layouts(
            weight, spec, _quiet(slots[1]), None, agree, contracted=0, rows=False, measured=measured
        ).columns
    rows = quant.keep_w == "requantise"
    layouts = quantize_layouts(
        weight,
        quant.output_w,
        _quiet(slots[0]),
        None,
        wire.agreement("w", quant.output_w, 1),
        contracted=1,
        rows=rows,
        columns=not rows,
        measured=measured,
    )
    return layouts.rows if rows else layouts.columns


def _serves_both(call: LinearCall) -> bool:
    """Whether a second copy is cast with a scale that follows from the first copy's amax."""
    assert call.plan is not None
    quant = call.plan.quant
    specs = quant.output_w, quant.grad_input_w
    return quant.keep_w == "second_copy" and all(map(_has_one_scale, specs))


def _has_one_scale(spec: QuantSpec) -> bool:
    return spec.granularity == "tensor" and spec.scale_source != "mse"


def _quiet(slot: ScaleSlot | None) -> ScaleSlot | None:
    return None if slot is None else slot._replace(amax=None)
