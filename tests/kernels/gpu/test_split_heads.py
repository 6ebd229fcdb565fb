"""Splitting and rotating heads: the launcher, its reference, and the layer that CPUs use."""

from __future__ import annotations

import pytest
import torch

from fp8train.kernels import split_heads as module
from fp8train.layers.qkv import split_heads as split_in_layers
from fp8train.layers.rotary import rotary_frequencies, rotary_table
from tests.kernels.gpu.same import same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "groups", "queries"), [(2, 19, 2, 3), (1, 16, 1, 1), (1, 5, 4, 2)]
)
def test_every_head(
    batch: int, length: int, groups: int, queries: int, rotates: bool, dtype: torch.dtype
) -> None:
    dim = 16
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, groups * (queries + 2) * dim, generator=generator).to(dtype)
    cos, sin = rotary_table(rotary_frequencies(dim, 10000.0, None), length, torch.float32)
    tables = (cos, sin) if rotates else (None, None)
    args = (qkv, *tables, groups, dim)
    launched, reference, fake = (
        module._split_op.launch(*args),
        module._split_heads(*args),
        module._split_heads_fake(*args),
    )
    in_layers = split_in_layers(qkv, *tables, num_kv_heads=groups, head_dim=dim)
    for ours, theirs, empty, layer in zip(launched, reference, fake, in_layers, strict=True):
        assert same(ours, theirs)
        assert ours.shape == empty.shape
        assert same(ours.transpose(1, 2), layer)
