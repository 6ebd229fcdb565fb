"""Casts of GEMM operands with one scale for the tensor: an amax, then codes in the layouts that GEMMs read.

Two operations, so two launches: the scale is a number of the whole tensor, known when all of it was seen. In
between ranks may agree on the amax. The first leaves *partials*, FP32 numbers whose largest magnitude is the
amax; the second finds the amax, the scale and its inverse itself, in every program, from a few kilobytes.

Hopper multiplies A row-major by B column-major, so backward reads operands that forward cast, transposed.
With one scale per tensor the transposed codes are the same codes: both are written in one pass.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.kernels.padding import ALIGNMENT, aligned
from fp8train.numerics.cast import amax_of, cast
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.scale import scale_from_amax
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec

PARTIALS = 1024
"""Most partials of one tensor."""
_CHUNK = 8192  # elements that leave one partial, where there are few


class CastRule(NamedTuple):
    """What an operator is told of a :class:`~fp8train.precision.operand_cast.QuantSpec` with one scale per
    tensor: plain numbers."""

    mantissa_bits: int
    power_of_two: bool
    margin: int
    constant_exponent: int | None

    @classmethod
    def of(cls, spec: QuantSpec) -> CastRule:
        """The rule of a spec; its scale is its own amax's, constant, or delayed."""
        assert spec.granularity == "tensor" and spec.scale_source != "mse", f"{spec} is cast elsewhere"
        return cls(spec.format.mantissa_bits, spec.power_of_two, spec.margin, spec.constant_exponent)

    @property
    def format(self) -> Format:
        """The format of the codes."""
        return E4M3 if self.mantissa_bits == E4M3.mantissa_bits else E5M2


class CastOperand(NamedTuple):
    """An operand of GEMMs in FP8.

    Attributes:
        codes: [M, K], zero-padded to multiples of 16; empty if not asked for.
        turned: the codes transposed, [K, M], likewise.
        scale_inv: FP32 scalar; NaN where the source was not finite.
        amax: FP32 scalar of the source.
    """

    codes: Tensor
    turned: Tensor
    scale_inv: Tensor
    amax: Tensor


def count_of_partials(numel: int) -> int:
    """How many partials a tensor of ``numel`` elements has: 1 to 1024."""
    return max(1, min(PARTIALS, -(-numel // _CHUNK)))


def _amax_partials(x: Tensor) -> Tensor:
    return amax_of(x).view(1)


def _amax_partials_fake(x: Tensor) -> Tensor:
    return x.new_empty(count_of_partials(x.numel()), dtype=torch.float32)


_amax_op = FusedOp(
    _amax_partials,
    launcher="fp8train.kernels.gpu.operands:amax_partials",
    fake=_amax_partials_fake,
    cost=lambda args, out: Cost(1, nbytes(args[0]), nbytes(out)),
)


def amax_partials(x: Tensor) -> Tensor:
    """FP32 numbers whose largest magnitude is the amax of ``x``, NaN among them if ``x`` has one.

    Args:
        x: contiguous, any shape and float dtype of up to 32 bits.

    Returns:
        FP32 [1 to 1024].
    """
    result: Tensor = _amax_op(x)
    return result


@cache
def _spec(rule: CastRule) -> QuantSpec:
    source = "current" if rule.constant_exponent is None else "constant"
    return QuantSpec(
        rule.format,
        scale_source=source,  # type: ignore[arg-type]
        power_of_two=rule.power_of_two,
        margin=rule.margin,
        constant_exponent=rule.constant_exponent,
    )


def scale_of_partials(
    partials: Tensor, delayed: Tensor | None, rule: CastRule
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, inverse, amax) of a tensor that left ``partials``: FP32 scalars."""
    amax = amax_of(partials)
    return *scale_from_amax(amax, _spec(rule), delayed=delayed), amax


def cast_with_partials(
    x: Tensor, partials: Tensor, delayed: Tensor | None, rule: CastRule, straight: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the references of all operations that end in an operand do with its values, [M, K]; the fields of
    :class:`CastOperand`."""
    scale, scale_inv, amax = scale_of_partials(partials, delayed, rule)
    codes = cast(x, rule.format, scale, scale_is_power_of_two=rule.power_of_two).view(torch.uint8)
    codes = F.pad(codes, (0, -codes.shape[1] % ALIGNMENT, 0, -codes.shape[0] % ALIGNMENT))
    codes = codes.view(dtype_of(rule.format))
    nothing = codes.new_empty(0)
    back = codes.t().contiguous() if turned else nothing
    return codes if straight else nothing, back, scale_inv, amax


def empty_operand(
    x: Tensor, shape: tuple[int, int], rule: CastRule, straight: bool, turned: bool
) -> CastOperand:
    """Memory of an operand of a source [M, K] on the device of ``x``."""
    rows, columns = aligned(shape[0]), aligned(shape[1])
    dtype = dtype_of(rule.format)
    return CastOperand(
        x.new_empty((rows, columns) if straight else 0, dtype=dtype),
        x.new_empty((columns, rows) if turned else 0, dtype=dtype),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


def _turn_codes(codes: Tensor) -> Tensor:
    return codes.t().contiguous()


_turn_op = FusedOp(
    _turn_codes,
    launcher="fp8train.kernels.gpu.operands:turn_codes",
    fake=lambda codes: codes.new_empty(codes.shape[1], codes.shape[0]),
    cost=lambda args, out: Cost(1, nbytes(args[0]), nbytes(out)),
)


def turn_codes(codes: Tensor) -> Tensor:
    """The transpose of contiguous FP8 codes [M, K], contiguous: [K, M]."""
    result: Tensor = _turn_op(codes)
    return result


def _cast_operand(
    x: Tensor,
    partials: Tensor,
    delayed: Tensor | None,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    constant_exponent: int | None,
    straight: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = CastRule(mantissa_bits, power_of_two, margin, constant_exponent)
    return cast_with_partials(x, partials, delayed, rule, straight, turned)


def _cast_operand_fake(
    x: Tensor,
    partials: Tensor,
    delayed: Tensor | None,
    mantissa_bits: int,
    power_of_two: bool,
    margin: int,
    constant_exponent: int | None,
    straight: bool,
    turned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = CastRule(mantissa_bits, power_of_two, margin, constant_exponent)
    return empty_operand(x, (x.shape[0], x.shape[1]), rule, straight, turned)


_cast_op = FusedOp(
    _cast_operand,
    launcher="fp8train.kernels.gpu.operands:cast_operand",
    fake=_cast_operand_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:3]), nbytes(*out)),
)


def cast_operand(
    x: Tensor,
    partials: Tensor,
    rule: CastRule,
    *,
    delayed: Tensor | None = None,
    straight: bool = True,
    turned: bool = False,
) -> CastOperand:
    """Cast a matrix with the scale of its amax, in one or both layouts.

    Args:
        x: contiguous [M, K], BF16, FP16 or FP32.
        partials: of x, from :func:`amax_partials`; or one number that ranks agreed on.
        rule: format and scale.
        delayed: FP32 scalar, a scale from earlier steps that replaces the amax's; 0 for none yet.
        straight: whether codes are wanted as x lies.
        turned: whether they are wanted transposed.

    Returns:
        Codes, padded with zeros to multiples of 16, and scale.
    """
    return CastOperand(*_cast_op(x, partials, delayed, *rule, straight, turned))
