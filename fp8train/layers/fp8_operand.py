"""Operands of FP8 GEMMs: quantised matrices, padded with zeros to what the GPU multiplies.

Padding comes after the amax was taken and multiplies to nothing, so it changes no value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.gemm import ALIGNMENT
from fp8train.numerics.cast import amax_of, cast
from fp8train.numerics.quant_spec import QuantSpec
from fp8train.numerics.scale import scale_from_amax
from fp8train.numerics.scale_state import ScaleSlot, record_amax
from fp8train.numerics.statistics import cast_statistics

Operand = tuple[Tensor, Tensor]  # (payload, scale_inv)


def aligned(size: int) -> int:
    """``size`` rounded up to a multiple of 16."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def pad_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad a matrix (FP8 too: through its bytes) to [rows, columns]; itself if it has that shape."""
    if x.shape == (rows, columns):
        return x
    padding = (0, columns - x.shape[1], 0, rows - x.shape[0])
    if x.element_size() == 1:
        return F.pad(x.view(torch.uint8), padding).view(x.dtype)
    return F.pad(x, padding)


def padded(operand: Operand) -> Operand:
    """The operand with its payload padded to multiples of 16."""
    payload, scale_inv = operand
    return pad_to(payload, aligned(payload.shape[0]), aligned(payload.shape[1])), scale_inv


def quantize_matrix(
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None = None,
    row: Tensor | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Operand:
    """Quantise a matrix.

    Args:
        x: [M, K], any float dtype.
        spec: how.
        slot: scale and running amax of a delayed cast; None for the other scale sources.
        row: receives the cast's statistics.
        agree: makes the amax of ``x`` that of the logical tensor which ``x`` is a part of.

    Returns:
        (payload [M, K], scale_inv FP32 scalar).
    """
    assert (slot is not None) == (spec.scale_source == "delayed"), (
        f"{spec}: delayed casts, and only they, have slots"
    )
    amax = amax_of(x)
    if agree is not None and spec.scale_source != "constant":
        amax = agree(amax)
    scale, scale_inv = scale_from_amax(amax, spec, delayed=None if slot is None else slot.scale)
    if slot is not None and slot.amax is not None:
        record_amax(amax, slot.amax)
    payload = cast(x, spec.format, scale, scale_is_power_of_two=spec.power_of_two)
    if row is not None:
        row.copy_(cast_statistics(x, payload, scale_inv))
    return payload, scale_inv


def quantize_operand(
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None = None,
    row: Tensor | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Operand:
    """As :func:`quantize_matrix`, padded for a GEMM to multiples of 16."""
    return padded(quantize_matrix(x, spec, slot, row, agree))
