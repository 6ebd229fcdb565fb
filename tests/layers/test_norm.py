"""Norms against their formulas in FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.layers.norm import LayerNorm, RMSNorm

SIZE, EPS = 64, 1e-3  # an eps large enough to notice if it were forgotten


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, centred: bool) -> Tensor:
    if centred:
        x = x - x.mean(dim=-1, keepdim=True)
    y = x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    return y if bias is None else y + bias


def make(kind: str, dtype: torch.dtype) -> RMSNorm | LayerNorm:
    norm = (
        RMSNorm(SIZE, eps=EPS, dtype=dtype)
        if kind == "rms"
        else LayerNorm(SIZE, eps=EPS, bias=kind == "layer+bias", dtype=dtype)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(SIZE, generator=generator))
    return norm


@pytest.mark.parametrize("kind", ["rms", "layer", "layer+bias"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
def test_value_and_gradients(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    norm = make(kind, dtype)
    generator = torch.Generator().manual_seed(8)
    x = (torch.randn(30, 50, SIZE, generator=generator) * 0.1 + 0.05).to(dtype).requires_grad_()
    upstream = torch.randn(30, 50, SIZE, generator=generator).to(dtype)
    ours = [norm(x), *torch.autograd.grad(norm(x), [x, *norm.parameters()], upstream)]

    exact = [t.detach().double().requires_grad_() for t in (x, *norm.parameters())]
    y = formula(exact[0], exact[1], exact[2] if len(exact) > 2 else None, kind != "rms")
    theirs = [y.detach(), *torch.autograd.grad(y, exact, upstream.double())]
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", ["rms", "layer+bias"])
def test_bf16_is_rounded_once(kind: str) -> None:
    """Statistics and gain in FP32: all but a few values (ties) are the nearest BF16 to the exact one."""
    norm = make(kind, torch.bfloat16)
    x = torch.randn(500, SIZE, generator=torch.Generator().manual_seed(9)).bfloat16()
    bias = getattr(norm, "bias", None)
    exact = formula(
        x.double(), norm.weight.double(), None if bias is None else bias.double(), kind == "layer+bias"
    )
    assert (norm(x) != exact.bfloat16()).double().mean() < 1e-3
