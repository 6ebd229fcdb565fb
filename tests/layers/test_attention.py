"""Attention against a naive softmax in FP64; the cache against the whole sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.layers.attention import Attention, KVCache
from fp8train.layers.linear import Alphas
from fp8train.layers.rotary import rotary_frequencies, rotary_table

HIDDEN, BATCH, LENGTH = 24, 2, 11


def make(heads: int, kv_heads: int, head_dim: int) -> Attention:
    attention = Attention(
        hidden_size=HIDDEN,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        bias=True,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return attention


def naive(attention: Attention, x: Tensor, rotate: bool) -> Tensor:
    """One head and one query at a time, straight from the rows of the fused projection."""
    heads, groups, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    per_group = heads // groups
    frequencies = rotary_frequencies(dim, 10000.0, None)

    def project(batch: int, position: int, row: int, turned: bool) -> Tensor:
        rows = slice(row * dim, (row + 1) * dim)
        assert attention.qkv.bias is not None
        vector = attention.qkv.weight[rows] @ x[batch, position] + attention.qkv.bias[rows]
        if not (turned and rotate):
            return vector
        pairs = torch.complex(vector[: dim // 2], vector[dim // 2 :])
        pairs = pairs * torch.polar(torch.ones(dim // 2, dtype=torch.float64), position * frequencies)
        return torch.cat((pairs.real, pairs.imag))

    batches = []
    for b in range(x.shape[0]):
        outputs = []
        for i in range(x.shape[1]):
            mixed = []
            for head in range(heads):
                group = head // per_group
                first_row = group * (per_group + 2)
                query = project(b, i, first_row + head % per_group, True)
                keys = torch.stack([project(b, j, first_row + per_group, True) for j in range(i + 1)])
                values = torch.stack([project(b, j, first_row + per_group + 1, False) for j in range(i + 1)])
                mixed.append(torch.softmax(keys @ query / dim**0.5, dim=0) @ values)
            outputs.append(torch.cat(mixed))
        batches.append(torch.stack(outputs))
    assert attention.out.bias is not None
    return torch.stack(batches) @ attention.out.weight.t() + attention.out.bias


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 6), (4, 2, 6), (6, 1, 4), (2, 1, 10)])
@pytest.mark.parametrize("rotate", [True, False])
def test_equals_naive_softmax(heads: int, kv_heads: int, head_dim: int, rotate: bool) -> None:
    attention = make(heads, kv_heads, head_dim)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = rotary_table(rotary_frequencies(head_dim, 10000.0, None), LENGTH, torch.float64)
    cos, sin = table if rotate else (None, None)
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [x.requires_grad_(), *attention.parameters()]
    ours, theirs = attention(x, cos, sin), naive(attention, x, rotate)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [4, 1, 1, 5], [1, 10], [7, 3, 1]])
def test_cache_continues_the_sequence(kv_heads: int, pieces: list[int]) -> None:
    attention = make(4, kv_heads, 6)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_table(rotary_frequencies(6, 10000.0, None), LENGTH, torch.float64)
    cache = KVCache(BATCH, kv_heads, LENGTH, 6, x)
    outputs, start = [], 0
    with torch.no_grad():
        for size in pieces:
            part = slice(start, start + size)
            outputs.append(attention(x[:, part], cos[part], sin[part], cache))
            start += size
            assert cache.length == start
        torch.testing.assert_close(torch.cat(outputs, dim=1), attention(x, cos, sin), rtol=0, atol=1e-12)
        with pytest.raises(AssertionError, match="cache is full"):
            attention(x[:, :1], cos[:1], sin[:1], cache)


def test_query_norms_are_the_largest_singular_values() -> None:
    attention = Attention(
        hidden_size=24,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        bias=False,
        dtype=torch.float32,
        qkv_alphas=Alphas(output=0.5),
    )
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.randn(40, 24, generator=torch.Generator().manual_seed(1)))
    rows = attention.qkv.weight.detach().double().view(2, 5, 4, 24)[:, :3].reshape(6, 4, 24)
    expected = 0.5 * torch.linalg.svdvals(rows)[:, 0]
    torch.testing.assert_close(attention.query_norms().double(), expected, rtol=1e-5, atol=0)
    with torch.no_grad():  # a run that diverges is told by its loss, not by an error of LAPACK
        attention.qkv.weight[0, 0] = torch.inf
    norms = attention.query_norms().double()
    assert norms[0].isnan()
    torch.testing.assert_close(norms[1:], expected[1:], rtol=1e-5, atol=0)
