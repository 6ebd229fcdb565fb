"""Hand-written backward passes against autograd's own, in FP64 by finite differences, in BF16 to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.layers import row_chunks as chunking
from fp8train.layers.embedding import Embedding
from fp8train.layers.loss import linear_cross_entropy
from fp8train.layers.norm import RMSNorm
from fp8train.layers.qkv import split_heads
from fp8train.layers.rotary import rotary_frequencies, rotary_table
from fp8train.layers.row_chunks import row_chunks
from fp8train.layers.swiglu import swiglu

CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that small inputs are cut into several, the last one partial."""
    monkeypatch.setattr(chunking, "_CPU_ELEMENTS", 40)


def plain_swiglu(fused: Tensor, unit: int) -> Tensor:
    units = fused.unflatten(-1, (-1, 2, unit))
    return (F.silu(units[..., 0, :]) * units[..., 1, :]).flatten(-2)


def plain_split(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: int, dim: int) -> list[Tensor]:
    """Heads one by one, each rotated as complex numbers would be."""
    columns = qkv.unflatten(-1, (groups, -1, dim))
    per_group = columns.shape[3] - 2

    def turn(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        a, b = x.to(cos.dtype).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    heads = [turn(columns[:, :, g, p]) for g in range(groups) for p in range(per_group)]
    keys = [turn(columns[:, :, g, per_group]) for g in range(groups)]
    values = [columns[:, :, g, per_group + 1] for g in range(groups)]
    return [torch.stack(part, dim=1) for part in (heads, keys, values)]


def test_row_blocks_cover_every_row_once() -> None:
    assert row_chunks(10, 1 << 15, CPU) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert row_chunks(3, 1 << 20, CPU) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert row_chunks(0, 8, CPU) == []
    assert row_chunks(10, 1 << 20, torch.device("meta")) == [slice(0, 10)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("unit", [1, 4])
def test_swiglu_gradient(unit: int) -> None:
    assert torch.autograd.gradcheck(lambda x: swiglu(x, unit=unit), random(3, 5, 16))


@pytest.mark.usefixtures("small_blocks")
def test_rms_norm_gradient() -> None:
    norm = RMSNorm(12, eps=1e-3, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (random(2, 5, 12), random(12, seed=4)))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("groups", "per_group"), [(2, 1), (2, 3), (1, 2)])
def test_split_heads(groups: int, per_group: int, rotate: bool) -> None:
    dim, length = 4, 5
    qkv = random(2, length, groups * (per_group + 2) * dim)
    table = (
        rotary_table(rotary_frequencies(dim, 100.0, None), length, torch.float64) if rotate else (None, None)
    )
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: split_heads(  # noqa: E731
        x, *table, num_kv_heads=groups, head_dim=dim
    )
    for ours, plain in zip(split(qkv), plain_split(qkv, *table, groups, dim), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(split, qkv)


def test_bf16_rotation_and_swiglu_round_as_autograd_does() -> None:
    """The same operations in the same order, cut into blocks, rounded once: equal bits both ways."""
    groups, dim, length = 2, 64, 300
    qkv = random(2, length, groups * 4 * dim, dtype=torch.bfloat16)
    table = rotary_table(rotary_frequencies(dim, 10000.0, None), length, torch.float32)
    ours = split_heads(qkv, *table, num_kv_heads=groups, head_dim=dim)
    plain = plain_split(qkv, *table, groups, dim)
    upstream = [random(*x.shape, dtype=torch.bfloat16, seed=i).detach() for i, x in enumerate(ours)]
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(x, qkv, upstream)[0] for x in (ours, plain)))
    fused = random(300, 1024, dtype=torch.bfloat16)
    pair = swiglu(fused, unit=128), plain_swiglu(fused, 128)
    grad = random(300, 512, dtype=torch.bfloat16, seed=9).detach()
    assert torch.equal(*pair)
    assert torch.equal(*(torch.autograd.grad(x, fused, grad)[0] for x in pair))


def test_bf16_rms_norm_rounds_once() -> None:
    """Against FP64: each result within half a BF16 step, sums over 3,000 rows included."""
    x, weight = random(3000, 96, dtype=torch.bfloat16), random(96, dtype=torch.bfloat16, seed=5)
    grad = random(3000, 96, dtype=torch.bfloat16, seed=6).detach()
    norm = RMSNorm(96, eps=1e-5, dtype=torch.bfloat16)
    y = torch.func.functional_call(norm, {"weight": weight}, (x,))
    ours = [y, *torch.autograd.grad(y, (x, weight), grad)]
    wide_x, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    wide = F.rms_norm(wide_x, (96,), wide_weight, 1e-5)
    expected = [wide, *torch.autograd.grad(wide, (wide_x, wide_weight), grad.double())]
    for got, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2**-8 * 1.01, atol=2e-5)


def test_float32_inputs_are_not_overwritten() -> None:
    """The working dtype of FP32 inputs is their own, so an in-place step would hit the caller's tensor."""
    x, weight = random(7, 8, dtype=torch.float32), torch.ones(8)
    hidden, fused, qkv = x.detach().clone(), x.detach().clone(), x.detach().clone()
    norm = RMSNorm(8, eps=1e-5, dtype=torch.float32)
    torch.func.functional_call(norm, {"weight": weight}, (x,)).sum().backward()
    linear_cross_entropy(x, torch.ones(5, 8), torch.zeros(7, dtype=torch.int64), vocab_size=5)
    swiglu(fused, unit=2)
    table = rotary_table(rotary_frequencies(2, 10.0, None), 1, torch.float32)
    split_heads(qkv[:, None], *table, num_kv_heads=1, head_dim=2)
    for tensor in (x.detach(), fused, qkv):
        assert torch.equal(tensor, hidden)


def test_bf16_embedding_gradient_of_a_common_token() -> None:
    """1,000 equal terms of 1: a BF16 running sum would stop at 256."""
    embedding = Embedding(4, 8, dtype=torch.bfloat16)
    torch.nn.init.ones_(embedding.weight)
    index = torch.full((1000,), 2)
    embedding(index).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.dtype == torch.bfloat16
    assert embedding.weight.grad[2].tolist() == [1000.0] * 8
    assert embedding.weight.grad[[0, 1, 3]].count_nonzero() == 0
