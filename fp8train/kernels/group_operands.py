"""Casts of GEMM operands whose scales belong to rows, columns or blocks, in the layouts that GEMMs read.

A scale is known once its group was seen, so a program that holds whole groups finds amax, scale and codes at
once: one launch, one read. Vectors of a whole dimension are the exception: rows are read twice, the second
time from the cache; columns, and rows together with columns, take two launches (the first leaves partial
amaxes).

Groups that lie along the dimension which a GEMM contracts serve that GEMM only. What two GEMMs read
(``keep_x: second_copy``, and every output gradient) is cast by :func:`cast_both`: from one read, codes for
the GEMM that contracts dimension 1, as they lie, and codes for the one that contracts dimension 0,
transposed, since tensor cores want the contracted dimension last.
Blocks of 128x128 serve both with the same codes, which :func:`cast_groups` writes in both layouts.

Scales come in the strides of torch's block kernels (:func:`fp8train.kernels.scaling.block_scales`): those of
neighbouring rows, or columns, are neighbours in memory.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.kernels.padding import Operand, aligned, padded
from fp8train.numerics.cast import quantize
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import DIRECTED, TWO_LEVELS, Granularity, scale_tile


class GroupRule(NamedTuple):
    """What an operator is told of a :class:`~fp8train.precision.operand_cast.QuantSpec` with scales of rows
    or blocks: plain values."""

    granularity: Granularity
    mantissa_bits: int
    power_of_two: bool
    margin: int

    @classmethod
    def of(cls, spec: QuantSpec) -> GroupRule:
        """The rule of a spec; each scale is that of its group's own amax."""
        known = spec.granularity != "tensor" and spec.granularity not in TWO_LEVELS
        assert known and spec.scale_source == "current", f"{spec} is cast elsewhere"
        return cls(spec.granularity, spec.format.mantissa_bits, spec.power_of_two, spec.margin)

    @property
    def format(self) -> Format:
        """The format of the codes."""
        return E4M3 if self.mantissa_bits == E4M3.mantissa_bits else E5M2

    @property
    def block(self) -> int | None:
        """Elements along the contracted dimension that share a scale; None for all of them."""
        return scale_tile(self.granularity, 1)[1]


class GroupOperand(NamedTuple):
    """An operand of GEMMs in FP8.

    Attributes:
        codes: [M, K], zero-padded to multiples of 16; empty if not asked for.
        turned: the codes transposed, [K, M], likewise.
        scale_inv: FP32, of the padded matrix [M, K] whichever layout is asked for, as
            :mod:`fp8train.numerics.granularity` says; NaN for groups that were not finite, 1 for rows or
            columns that are padding.
    """

    codes: Tensor
    turned: Tensor
    scale_inv: Tensor


class TwoOperands(NamedTuple):
    """One matrix as the operand of two GEMMs.

    Attributes:
        codes: [M, K] for the GEMM that contracts dimension 1, zero-padded to multiples of 16.
        scale_inv: of these codes, as in :class:`GroupOperand`.
        turned: [K, M], transposed, for the GEMM that contracts dimension 0.
        turned_scale_inv: of those codes, as of the matrix [M, K]: transposed it belongs to ``turned``.
    """

    codes: Tensor
    scale_inv: Tensor
    turned: Tensor
    turned_scale_inv: Tensor


@cache
def _spec(rule: GroupRule) -> QuantSpec:
    return QuantSpec(
        rule.format, granularity=rule.granularity, power_of_two=rule.power_of_two, margin=rule.margin
    )


def shape_of_scales(shape: tuple[int, int], granularity: Granularity, contracted: int) -> tuple[int, int]:
    """Shape of the scales of an unpadded matrix [M, K], once its operand is padded.

    The scale of a matrix of a single row is not repeated for padding: it broadcasts.
    """
    rows, columns = (
        1 if tile is None else -(-size // tile) if tile > 1 or size == 1 else aligned(size)
        for size, tile in zip(shape, scale_tile(granularity, contracted), strict=True)
    )
    return rows, columns


def _columns_first(granularity: Granularity, contracted: int) -> bool:
    """Whether scales of one column of blocks lie together, rather than those of a row of them."""
    return contracted == 1 and granularity in ("block_1x128", "mx_1x32")


def empty_scales(x: Tensor, granularity: Granularity, contracted: int) -> Tensor:
    """Memory of the scales of ``x`` on its device, in their strides."""
    shape = shape_of_scales((x.shape[0], x.shape[1]), granularity, contracted)
    if _columns_first(granularity, contracted):
        return x.new_empty(shape[::-1], dtype=torch.float32).t()
    return x.new_empty(shape, dtype=torch.float32)


def empty_codes(x: Tensor, rule: GroupRule, *, turned: bool) -> Tensor:
    """Memory of padded codes of ``x``, or of those transposed."""
    shape = aligned(x.shape[0]), aligned(x.shape[1])
    return x.new_empty(shape[::-1] if turned else shape, dtype=dtype_of(rule.format))


def _operand(x: Tensor, rule: GroupRule, contracted: int) -> Operand:
    codes, scale_inv = padded(quantize(x, _spec(rule), contracted=contracted))
    if _columns_first(rule.granularity, contracted):
        scale_inv = scale_inv.t().contiguous().t()
    return codes, scale_inv


def _cast_groups(
    x: Tensor,
    granularity: str,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    contracted: int,
    straight: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = GroupRule(granularity, mantissa_bits, power_of_two, margin)  # type: ignore[arg-type]
    codes, scale_inv = _operand(x, rule, contracted)
    nothing = codes.new_empty(0)
    back = codes.t().contiguous() if turned else nothing
    return codes if straight else nothing, back, scale_inv


def empty_group_operand(
    x: Tensor, rule: GroupRule, contracted: int, straight: bool, turned: bool
) -> GroupOperand:
    """Memory of what :func:`cast_groups` returns."""
    nothing = x.new_empty(0, dtype=dtype_of(rule.format))
    return GroupOperand(
        empty_codes(x, rule, turned=False) if straight else nothing,
        empty_codes(x, rule, turned=True) if turned else nothing.clone(),
        empty_scales(x, rule.granularity, contracted),
    )


def _cast_groups_fake(
    x: Tensor,
    granularity: str,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    contracted: int,
    straight: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = GroupRule(granularity, mantissa_bits, power_of_two, margin)  # type: ignore[arg-type]
    return empty_group_operand(x, rule, contracted, straight, turned)


PART_COLUMNS = 128
"""Columns of a tile whose rows leave partial amaxes."""
PART_ROWS = 64
_MOST_PARTS = 64


def parts_of_columns(height: int) -> int:
    """How many partial amaxes each column of ``height`` elements has: 1 to 64."""
    return max(1, min(_MOST_PARTS, -(-height // PART_ROWS)))


def parts_of_rows(width: int) -> int:
    """How many partial amaxes each row of ``width`` elements has."""
    return max(1, -(-width // PART_COLUMNS))


def _cost(x: Tensor, results: tuple[Tensor, ...], row_parts: bool, column_parts: bool) -> Cost:
    """Of one launch; of two, with a second read of ``x``, where vectors leave partial amaxes."""
    height, width = x.shape
    parts = 4 * (row_parts * parts_of_rows(width) * height + column_parts * parts_of_columns(height) * width)
    launches = 2 if parts or row_parts or column_parts else 1
    return Cost(launches, launches * nbytes(x) + parts, nbytes(*results) + parts)


_groups_op = FusedOp(
    _cast_groups,
    launcher="fp8train.kernels.gpu.group_operands:cast_groups",
    fake=_cast_groups_fake,
    cost=lambda args, out: _cost(args[0], out, False, args[1] == "row" and args[5] == 0),
)


def cast_groups(
    x: Tensor, rule: GroupRule, *, contracted: int, straight: bool = True, turned: bool = False
) -> GroupOperand:
    """Cast a matrix with a scale for each row, column or block, in one or both layouts.

    Args:
        x: contiguous [M, K], BF16, FP16 or FP32.
        rule: format, what shares a scale, and the scale.
        contracted: dimension of x that the GEMM contracts, 0 or 1.
        straight: whether codes are wanted as x lies.
        turned: whether they are wanted transposed.

    Returns:
        Codes, padded with zeros to multiples of 16, and scales.
    """
    return GroupOperand(*_groups_op(x, *rule, contracted, straight, turned))


def _cast_both(
    x: Tensor, granularity: str, mantissa_bits: int, power_of_two: bool, margin: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = GroupRule(granularity, mantissa_bits, power_of_two, margin)  # type: ignore[arg-type]
    codes, scale_inv = _operand(x, rule, 1)
    others, others_scale_inv = _operand(x, rule, 0)
    return codes, scale_inv, others.t().contiguous(), others_scale_inv


def empty_two_operands(x: Tensor, rule: GroupRule) -> TwoOperands:
    """Memory of what :func:`cast_both` returns."""
    return TwoOperands(
        empty_codes(x, rule, turned=False),
        empty_scales(x, rule.granularity, 1),
        empty_codes(x, rule, turned=True),
        empty_scales(x, rule.granularity, 0),
    )


def _cast_both_fake(
    x: Tensor, granularity: str, mantissa_bits: int, power_of_two: bool, margin: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = GroupRule(granularity, mantissa_bits, power_of_two, margin)  # type: ignore[arg-type]
    return empty_two_operands(x, rule)


_both_op = FusedOp(
    _cast_both,
    launcher="fp8train.kernels.gpu.group_operands:cast_both",
    fake=_cast_both_fake,
    cost=lambda args, out: _cost(args[0], out, args[1] == "row", args[1] == "row"),
)


def cast_both(x: Tensor, rule: GroupRule) -> TwoOperands:
    """Cast a matrix for the GEMM that contracts its dimension 1 and for the one that contracts dimension 0.

    Args:
        x: contiguous [M, K], BF16, FP16 or FP32.
        rule: of both; its scales lie along the contracted dimension (``row``, ``block_1x128``, ``mx_1x32``).

    Returns:
        Two casts of x: the codes of the second are transposed.
    """
    assert rule.granularity in DIRECTED, f"{rule.granularity}: one cast serves both"
    return TwoOperands(*_both_op(x, *rule))
