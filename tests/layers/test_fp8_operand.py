"""Operands as fused operations cast them, against the chain of torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels import fused_op
from fp8train.kernels.padding import padded
from fp8train.layers.fp8_operand import quantize_layouts, quantize_matrix
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same

SPECS = [
    QuantSpec(E4M3),
    QuantSpec(E4M3, "row"),
    QuantSpec(E5M2, "block_1x128", power_of_two=False),
    QuantSpec(E4M3, "block_128x128", margin=1),
    QuantSpec(E4M3, "mx_1x32"),
]


def source(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fused_casts_are_the_chains(
    monkeypatch: pytest.MonkeyPatch, spec: QuantSpec, contracted: int, dtype: torch.dtype
) -> None:
    """Codes and scales; a GPU gets those of the GEMM that sums over M column-major."""
    x = source((131, 300), dtype).t().contiguous().t()  # strides are not the cast's business
    chain = quantize_matrix(x, spec, contracted=contracted)
    monkeypatch.setattr(fused_op, "fuses", lambda x: True)
    fused = quantize_matrix(x, spec, contracted=contracted)
    both = quantize_layouts(x, spec, contracted=contracted)
    for theirs, ours in zip(chain, fused, strict=True):
        assert same(ours, theirs)
    for operand in both:
        for theirs, ours in zip(padded(chain), operand, strict=True):
            assert same(ours, theirs)
    if dtype == torch.float64:
        return  # by the chain
    if contracted == 1 or not spec.directed:
        assert both.rows[0].is_contiguous()
    if contracted == 0 or not spec.directed:
        assert both.columns[0].t().is_contiguous()
