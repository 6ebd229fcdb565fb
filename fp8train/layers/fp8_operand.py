"""Operands of FP8 GEMMs: quantised matrices, padded with zeros to what the GPU multiplies
(:mod:`fp8train.kernels.padding`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fp8train.comm.sequence_parallel import Agreement
from fp8train.kernels import fused_op
from fp8train.kernels.group_operands import GroupRule, cast_both, cast_groups
from fp8train.kernels.operands import CastOperand, CastRule, amax_partials, cast_operand
from fp8train.kernels.padding import Operand, padded
from fp8train.numerics.cast import amax_of, cast, operand_amax
from fp8train.numerics.granularity import expand_scales
from fp8train.numerics.mse_scale import magnitude_counts, mse_scale
from fp8train.numerics.nvfp4 import hadamard, quantize_nvfp4
from fp8train.numerics.scale import scale_from_amax
from fp8train.numerics.scale_state import ScaleSlot, record_amax
from fp8train.numerics.statistics import cast_statistics
from fp8train.precision.linear_gemms import Keep
from fp8train.precision.operand_cast import QuantSpec


class Layouts(NamedTuple):
    """One matrix as the operand of two GEMMs.

    Attributes:
        rows: [M, K] row-major, for the GEMM that sums over K.
        columns: [M, K] for the GEMM that sums over M; column-major where tensor cores want that.

    Where only one is asked for, or scales serve one GEMM alone, both fields are that one.
    """

    rows: Operand
    columns: Operand


class Caster(Protocol):
    """Casts whole matrices in place of the functions here; chosen once, when a model is built. Its codes are
    the same bits."""

    def cast(
        self, x: Tensor, spec: QuantSpec, slot: ScaleSlot | None, *, rows: bool, columns: bool
    ) -> tuple[Operand | None, Operand | None] | None:
        """The operands for GEMMs that contract dimension 1 (``rows``) and 0 (``columns``) of x [M, K], as far
        as they are wanted; None where the functions here have to do it."""
        ...


class Measured(NamedTuple):
    """What a cast has to know of a whole matrix before it makes codes, so that the same codes can be made
    again without another look at it, or another agreement with other ranks.

    Attributes:
        amax: FP32, of what shares a scale, other ranks' parts included; or partials of a tensor's.
        scale: the scale of least squared error; None where ``amax`` and a delayed scale tell the scale.
    """

    amax: Tensor
    scale: Tensor | None = None


def cropped(operand: Operand, rows: int, columns: int) -> Operand:
    """The first ``rows`` and ``columns`` of an operand: what it was before :func:`padded`."""
    payload, scale_inv = operand
    if scale_inv.dim():
        kept = [
            min(count, size) if count == whole else count
            for size, whole, count in zip((rows, columns), payload.shape, scale_inv.shape, strict=True)
        ]
        scale_inv = scale_inv[: kept[0], : kept[1]]
    return payload[:rows, :columns], scale_inv


def transposed(operand: Operand) -> Operand:
    """The operand of the transposed matrix, as views."""
    payload, scale_inv = operand
    return payload.t(), scale_inv.t() if scale_inv.dim() else scale_inv


def quantize_matrix(
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None = None,
    row: Tensor | None = None,
    agree: Agreement | None = None,
    *,
    contracted: int,
    measured: Measured | None = None,
) -> Operand:
    """Quantise a matrix for one GEMM: take its amax, agree on it with other ranks, choose the scale, cast.

    Args:
        x: [M, K], any float dtype.
        spec: how.
        slot: scale and running amax of a delayed cast; None for the other scale sources.
        row: receives the cast's statistics.
        agree: makes what is known of ``x`` that of the logical tensor which ``x`` is a part of; None where
            nothing that shares a scale is cut.
        contracted: dimension of ``x`` that the GEMM contracts.
        measured: what :func:`measure` said of these values; None: they are measured here.

    Returns:
        (payload [M, K], scale_inv FP32: a scalar, or 2-D for scales of rows or blocks). The payload of a
        transformed NVFP4 operand has its contracted dimension padded to a multiple of 16.
    """
    if spec.is_nvfp4:
        return _simulate_nvfp4(x, spec, row, agree, contracted=contracted, measured=measured)
    assert (slot is not None) == (spec.scale_source == "delayed"), (
        f"{spec}: delayed casts, and only they, have slots"
    )
    if row is None and casts_at_once(x, spec):
        codes = cast_at_once(x, spec, slot, agree, turned=False, measured=measured)
        return cropped((codes.codes, codes.scale_inv), *x.shape)
    if row is None and agree is None and casts_groups(x, spec):
        groups = cast_groups(x.contiguous(), GroupRule.of(spec), contracted=contracted)
        return cropped((groups.codes, groups.scale_inv), *x.shape)
    if measured is None:
        measured = _measure(x, spec, agree, contracted)
    amax = amax_of(measured.amax) if measured.amax.dim() == 1 else measured.amax  # partials
    chosen = measured.scale if slot is None else slot.scale
    scale, scale_inv = scale_from_amax(amax, spec, delayed=chosen)
    if slot is not None and slot.amax is not None:
        record_amax(amax, slot.amax)
    payload = cast(x, spec.format, expand_scales(scale, x.shape), scale_is_power_of_two=spec.power_of_two)
    if row is not None:
        row.copy_(cast_statistics(x, payload, expand_scales(scale_inv, x.shape)))
    return payload, scale_inv


def _measure(x: Tensor, spec: QuantSpec, agree: Agreement | None, contracted: int) -> Measured:
    amax = operand_amax(x, spec, contracted)
    if agree is not None and spec.scale_source != "constant":
        amax = agree.largest(amax)
    if spec.scale_source != "mse":
        return Measured(amax)
    counts = magnitude_counts(x)
    return Measured(amax, mse_scale(amax, counts if agree is None else agree.total(counts), spec)[0])


def measure(x: Tensor, spec: QuantSpec, agree: Agreement | None, *, contracted: int) -> Measured | None:
    """What a cast of ``x`` as by :func:`quantize_matrix` has to know of all of it; None where the cast finds
    out in the launch that makes the codes."""
    if casts_at_once(x, spec):
        return Measured(_partials(x.contiguous(), spec, agree))
    if agree is None and casts_groups(x, spec):
        return None
    if spec.is_nvfp4:
        amax = amax_of(_transformed(x, spec, contracted))
        return Measured(amax if agree is None else agree.largest(amax))
    return _measure(x, spec, agree, contracted)


def casts_at_once(x: Tensor, spec: QuantSpec) -> bool:
    """Whether a fused operation casts ``x`` like this."""
    one_scale = spec.granularity == "tensor" and spec.scale_source != "mse"
    return one_scale and x.dtype != torch.float64 and fused_op.fuses(x)


def casts_groups(x: Tensor, spec: QuantSpec) -> bool:
    """Whether a fused operation casts ``x`` like this, with scales of its rows or blocks."""
    of_groups = spec.granularity != "tensor" and not spec.is_nvfp4
    return of_groups and x.dtype != torch.float64 and fused_op.fuses(x)


def cast_at_once(
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None,
    agree: Agreement | None,
    *,
    turned: bool,
    straight: bool = True,
    measured: Measured | None = None,
) -> CastOperand:
    """:func:`quantize_matrix` in two launches, in one or both layouts, padded; in one if it is ``measured``
    already."""
    x = x.contiguous()
    cast = partial(_cast, x, straight=straight, turned=turned)
    if measured is not None:
        return agreed_cast(measured.amax.view(-1), spec, slot, None, cast)
    return agreed_cast(amax_partials(x), spec, slot, agree, cast)


def _partials(x: Tensor, spec: QuantSpec, agree: Agreement | None) -> Tensor:
    partials = amax_partials(x)
    if agree is None or spec.scale_source == "constant":
        return partials
    return agree.largest(amax_of(partials)).view(1)


def _cast(
    x: Tensor, partials: Tensor, rule: CastRule, delayed: Tensor | None, *, straight: bool, turned: bool
) -> CastOperand:
    return cast_operand(x, partials, rule, delayed=delayed, straight=straight, turned=turned)


def agreed_cast(
    partials: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None,
    agree: Agreement | None,
    cast: Callable[[Tensor, CastRule, Tensor | None], CastOperand],
) -> CastOperand:
    """What stands around the cast of a tensor whose amax is known in parts.

    Args:
        partials: FP32, their largest magnitude is the amax of this rank's part.
        spec: how to cast; one scale per tensor.
        slot: scale and running amax of a delayed cast.
        agree: makes the amax that of the logical tensor.
        cast: casts with these partials, rule, and delayed scale.
    """
    if agree is not None and spec.scale_source != "constant":
        partials = agree.largest(amax_of(partials)).view(1)
    result = cast(partials, CastRule.of(spec), None if slot is None else slot.scale)
    if slot is not None and slot.amax is not None:
        record_amax(result.amax, slot.amax)
    return result


def quantize_layouts(
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None = None,
    row: Tensor | None = None,
    agree: Agreement | None = None,
    *,
    contracted: int,
    rows: bool = True,
    columns: bool = True,
    measured: Measured | None = None,
    caster: Caster | None = None,
) -> Layouts:
    """Quantise a matrix for two GEMMs, one that sums over its rows and one that sums over its columns; padded
    to multiples of 16. Arguments as for :func:`quantize_matrix`, which defines the codes; ``rows`` and
    ``columns`` say which of the two are wanted, ``caster`` who may cast."""
    if caster is not None and row is None and agree is None and measured is None:
        wanted = (contracted == 1, contracted == 0) if spec.directed else (rows, columns)
        made = caster.cast(x, spec, slot, rows=wanted[0], columns=wanted[1])
        if made is not None:
            return _both(made)
    if row is None and casts_at_once(x, spec):
        both = cast_at_once(x, spec, slot, agree, straight=rows, turned=columns, measured=measured)
        return _layouts(both.codes, both.turned, both.scale_inv, rows, columns)
    if row is None and agree is None and casts_groups(x, spec):
        if spec.directed:
            rows, columns = contracted == 1, contracted == 0
        groups = cast_groups(
            x.contiguous(), GroupRule.of(spec), contracted=contracted, straight=rows, turned=columns
        )
        return _layouts(groups.codes, groups.turned, groups.scale_inv, rows, columns)
    operand = padded(quantize_matrix(x, spec, slot, row, agree, contracted=contracted, measured=measured))
    return Layouts(operand, operand)


def _both(made: tuple[Operand | None, Operand | None]) -> Layouts:
    """Layouts of what a caster made; where one is missing, the other stands for it."""
    rows, columns = made[0] or made[1], made[1] or made[0]
    assert rows is not None and columns is not None
    return Layouts(rows, columns)


def _layouts(codes: Tensor, turned: Tensor, scale_inv: Tensor, rows: bool, columns: bool) -> Layouts:
    assert rows or columns
    straight, back = (codes, scale_inv), (turned.t(), scale_inv)
    return Layouts(straight if rows else back, back if columns else straight)


def quantize_twice(
    x: Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    row: Tensor | None,
    agreements: tuple[Agreement | None, Agreement | None],
    caster: Caster | None = None,
) -> Layouts | None:
    """Quantise a matrix by one spec for the GEMM that sums over its columns and by another for the one that
    sums over its rows, from one read; None where only two casts do that.

    Args:
        x: [M, K].
        specs: for the two GEMMs.
        row: as for :func:`quantize_matrix`.
        agreements: likewise, of the two casts.
        caster: who may cast.
    """
    spec, other = specs
    cut = row is not None or any(agree is not None for agree in agreements)
    if cut or spec != other or not spec.directed:
        return None
    if caster is not None and (made := caster.cast(x, spec, None, rows=True, columns=True)) is not None:
        return _both(made)
    if not casts_groups(x, spec):
        return None
    both = cast_both(x.contiguous(), GroupRule.of(spec))
    return Layouts((both.codes, both.scale_inv), (both.turned.t(), both.turned_scale_inv))


def quantize_kept(
    x: Tensor,
    keep: Keep,
    specs: tuple[QuantSpec, QuantSpec],
    slots: tuple[ScaleSlot | None, ScaleSlot | None],
    row: Tensor | None,
    agreements: tuple[Agreement | None, Agreement | None],
    *,
    trains: bool = True,
    caster: Caster | None = None,
) -> Layouts:
    """Quantise x or w for the output GEMM, which sums over its columns, and for the backward GEMM that sums
    over its rows, as ``keep`` says (:class:`~fp8train.precision.linear_gemms.LinearQuant`).

    Args:
        x: [M, K].
        keep: what backward reads. ``requantise`` and ``bf16`` leave it to others: both fields are forward's.
        specs: of the two uses; so are slots and agreements, as for :func:`quantize_matrix`.
        slots: of delayed casts.
        row: receives the statistics of the forward cast.
        agreements: with other ranks.
        trains: whether there will be a backward.
        caster: who may cast.
    """
    second = keep == "second_copy" and trains
    if second and (both := quantize_twice(x, specs, row, agreements, caster)) is not None:
        return both
    columns = keep == "same" and trains
    first = quantize_layouts(
        x, specs[0], slots[0], row, agreements[0], contracted=1, columns=columns, caster=caster
    )
    if not second:
        return first
    copy = quantize_layouts(
        x, specs[1], slots[1], None, agreements[1], contracted=0, rows=False, caster=caster
    )
    return Layouts(first.rows, copy.columns)


def _transformed(x: Tensor, spec: QuantSpec, contracted: int) -> Tensor:
    """What the simulation of NVFP4 rounds: FP32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (hadamard(wide, contracted) if spec.hadamard else x).float()


def _simulate_nvfp4(
    x: Tensor,
    spec: QuantSpec,
    row: Tensor | None,
    agree: Agreement | None,
    *,
    contracted: int,
    measured: Measured | None,
) -> Operand:
    source = _transformed(x, spec, contracted)
    if measured is None:
        amax = amax_of(source)
        measured = Measured(amax if agree is None else agree.largest(amax))
    payload, scale_inv = quantize_nvfp4(
        source,
        measured.amax,
        x.dtype,
        contracted=contracted,
        square=spec.granularity == "nv_16x16",
        stochastic=spec.rounding == "stochastic",
    )
    if row is not None:
        row.copy_(cast_statistics(source, payload, scale_inv))
    return payload, scale_inv


def quantize_operand(
    x: Tensor,
    spec: QuantSpec,
    slot: ScaleSlot | None = None,
    row: Tensor | None = None,
    agree: Agreement | None = None,
    *,
    contracted: int,
) -> Operand:
    """Quantise a matrix as :func:`quantize_matrix` does, and pad it for a GEMM to multiples of 16."""
    return padded(quantize_matrix(x, spec, slot, row, agree, contracted=contracted))
