"""The launchers of scale layouts against their references (which ``tests/kernels/test_array_scales.py``
compares with the formulas of the kernels that read them)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import scaling
from fp8train.kernels.fused_op import FusedOp
from fp8train.kernels.group_operands import GroupRule, cast_groups
from fp8train.kernels.scaling import block_scales
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same

SHAPES = [(1, 1), (16, 3), (128, 4), (160, 6), (257, 130), (0, 4), (4, 0)]


def powers(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.randint(-126, 127, (rows, columns), generator=generator).float())
    scales.view(-1)[::7] = torch.nan
    return scales


@pytest.mark.parametrize("op", [scaling._mx_op, scaling._square_op], ids=lambda op: op.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(op: FusedOp, shape: tuple[int, int]) -> None:
    scales = powers(*shape)
    for given in (scales, scales.t().contiguous().t(), scales.t()):
        launched, reference, fake = op.launch(given), op.reference(given), op(given.to("meta"))
        assert same(launched, reference)
        assert (fake.shape, fake.dtype) == (reference.shape, reference.dtype)
        if launched.numel():
            assert launched.stride() == reference.stride() == fake.stride()


@pytest.mark.parametrize("contracted", [0, 1])
def test_scales_of_a_cast_are_laid_out_already(contracted: int) -> None:
    """Those of A, or of B's transpose, are what :func:`block_scales` returns, without a copy."""
    x = torch.randn(272, 400, generator=torch.Generator().manual_seed(0))
    rule = GroupRule.of(QuantSpec(E4M3, "block_1x128"))
    scale_inv = cast_groups(x, rule, contracted=contracted).scale_inv
    along_k = scale_inv if contracted == 1 else scale_inv.t()
    laid = block_scales(along_k, "block_1x128")
    assert laid.data_ptr() == scale_inv.data_ptr()
    assert laid.stride() == (1, laid.shape[0])
