"""Widened products mean what BF16 products mean: exact products, a wide sum, one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels.attention import scaled_dot_product_attention
from fp8train.kernels.matmul import cpu_multiplies_bf16, matmul

pytestmark = pytest.mark.usefixtures("each_cpu")


def ulps(result: Tensor, exact: Tensor) -> float:
    """Largest distance from the correctly rounded value, in BF16 units of the last place."""
    expected = exact.to(torch.bfloat16)
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 7)
    return float(((result.double() - expected.double()).abs() / ulp).max())


def test_a_bf16_product_is_the_exact_one_rounded_once() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((33, 256), (256, 48)))
    product = matmul(a, b)
    assert product.dtype == torch.bfloat16
    exact = a.double() @ b.double()
    # Where the sum nearly cancels, FP32 accumulation is allowed to be an ulp of the result's off.
    assert ulps(product[exact.abs() > 1], exact[exact.abs() > 1]) <= 1.0
    assert float((product.double() == exact.bfloat16().double()).double().mean()) > 0.99


def test_the_fixture_reaches_the_branch(each_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without BF16 never sees a BF16 product; one with it sees nothing else."""
    dtypes = []
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: dtypes.append(a.dtype) or whole(a, b))
    matmul(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16())
    assert dtypes == [torch.bfloat16 if each_cpu else torch.float32]
    assert cpu_multiplies_bf16() is each_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_types_are_left_alone(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    assert torch.equal(matmul(a, b), a @ b)


def test_attention_keeps_the_dtype_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8))
    q, k, v = (torch.randn(s, generator=generator).bfloat16().requires_grad_() for s in shapes)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    settings = {"attn_mask": None, "is_causal": True, "enable_gqa": True}
    mixed = scaled_dot_product_attention(q, k, v, **settings)
    exact = scaled_dot_product_attention(*wide, **settings)
    assert mixed.dtype == torch.bfloat16
    assert torch.allclose(mixed.double(), exact, atol=2e-2)
    mixed.float().sum().backward()
    exact.sum().backward()
    for narrow, reference in zip((q, k, v), wide, strict=True):
        assert torch.allclose(narrow.grad.double(), reference.grad, atol=4e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_alpha_is_applied_before_the_one_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(24, 24, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    got = matmul(a, b.t(), alpha=0.3)
    exact = 0.3 * (a.double() @ b.double().t())
    assert got.dtype == dtype
    if dtype == torch.bfloat16:
        once = exact.to(dtype)  # sums in FP32 may fall on the other side of a tie
        assert (got != once).double().mean() < 0.01
        twice = (exact / 0.3).to(dtype) * 0.3
        assert (twice != once).double().mean() > 0.05
    else:
        torch.testing.assert_close(
            got.double(), exact, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6
        )


@pytest.mark.parametrize("in_fp32", [False, True])
def test_attention_scale_and_precision(in_fp32: bool) -> None:
    """A scale of the logits, and what backward uses of the output, against FP64."""
    generator = torch.Generator().manual_seed(3)
    heads = [torch.randn(1, 2, 16, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    got = scaled_dot_product_attention(
        *heads, attn_mask=None, is_causal=True, enable_gqa=False, scale=0.05, in_fp32=in_fp32
    )
    assert got.dtype == torch.bfloat16
    q, k, v = (head.detach().double() for head in heads)
    scores = (0.05 * q @ k.transpose(-1, -2)).masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
    torch.testing.assert_close(got.double(), torch.softmax(scores, -1) @ v, rtol=0.02, atol=0.02)
