"""The FP8 operand of a weight from its master as it is stored, in one launch: decode, scale, encode.

The optimizer knows the amax of a master that it just stored, so the scale of the operand is known before the
first code is: the master is read once in its own format, 2 bytes and a scale per block at O2, and the codes
are written, 1 byte; 2 with the transposed codes that backward reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.kernels.operands import CastRule, scale_of_partials
from fp8train.kernels.optimizer_update import decode_stored
from fp8train.numerics.cast import cast


class StoredWeight(NamedTuple):
    """A master weight as it is stored, or a rank's rows of it.

    Attributes:
        payload: codes or values [rows, K], contiguous.
        scale: E8M0 bytes of its blocks, or lower halves, as :mod:`fp8train.kernels.optimizer_update` has
            them; None where the format has neither.
        mantissa: bits of its format, as there.
        block: elements of a row that share a scale.
        amax: FP32 scalar, largest magnitude of the whole logical weight.
    """

    payload: Tensor
    scale: Tensor | None
    mantissa: int
    block: int
    amax: Tensor


def _cast_stored(
    codes: Tensor,
    turned: Tensor,
    scale_out: Tensor,
    scale_inv_out: Tensor,
    amax_out: Tensor,
    payload: Tensor,
    scale: Tensor | None,
    mantissa: int,
    block: int,
    amax: Tensor,
    delayed: Tensor | None,
    first_row: int,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    constant_exponent: int | None,
) -> None:
    rule = CastRule(mantissa_bits, power_of_two, margin, constant_exponent)
    new_scale, new_inverse, largest = scale_of_partials(amax.view(1), delayed, rule)
    rows, columns = payload.shape
    values = decode_stored(payload, scale, mantissa, block).view(rows, columns)
    cast_values = cast(values, rule.format, new_scale, scale_is_power_of_two=power_of_two)
    to, new = slice(first_row, first_row + rows), cast_values.view(torch.uint8)
    codes.view(torch.uint8)[to, :columns] = new
    if turned.numel():
        turned.view(torch.uint8)[:columns, to] = new.t()
    scale_out.copy_(new_scale)
    scale_inv_out.copy_(new_inverse)
    amax_out.copy_(largest)


def _cost(args: tuple[Any, ...], out: None) -> Cost:
    numel, layouts = args[5].numel(), 2 if args[1].numel() else 1
    return Cost(1, nbytes(args[5], args[6], args[9], args[10]), layouts * numel + nbytes(*args[2:5]))


_cast_op = FusedOp(
    _cast_stored,
    launcher="fp8train.kernels.gpu.stored_weight:cast_stored",
    fake=lambda *args: None,
    cost=_cost,
    mutates=("codes", "turned", "scale_out", "scale_inv_out", "amax_out"),
)


def cast_stored(
    codes: Tensor,
    scales: tuple[Tensor, Tensor],
    amax: Tensor,
    weight: StoredWeight,
    rule: CastRule,
    *,
    delayed: Tensor | None,
    first_row: int,
    turned: Tensor | None = None,
) -> None:
    """Write an operand's codes, scale and inverse scale, and its amax.

    Args:
        codes: FP8 [.., columns], contiguous, padded to multiples of 16; rows of the weight are written.
        scales: (scale, inverse): FP32 scalars.
        amax: FP32 scalar, likewise written.
        weight: what to cast.
        rule: format and scale.
        delayed: FP32 scalar, a scale from earlier steps that replaces the amax's; 0 for none yet.
        first_row: of ``codes`` where the weight begins.
        turned: FP8, of the transposed shape of ``codes``: likewise written, if given.
    """
    turned = codes.new_empty(0) if turned is None else turned
    _cast_op(codes, turned, *scales, amax, *weight, delayed, first_row, *rule)
