"""The feed-forward layer against its formula; the order of fused rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8train.layers.mlp import MLP, Activation, shard_unit
from fp8train.layers.residual import ResidualRule


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("width", "unit"), [(48, 16), (128, 128), (384, 128), (14336, 128), (11008, 128), (2816, 128), (21, 1)]
)
def test_shard_unit(width: int, unit: int) -> None:
    assert shard_unit(width) == unit


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("width", [384, 48])
def test_equals_formula(activation: Activation, width: int) -> None:
    mlp = MLP(hidden_size=8, ffn_hidden_size=width, activation=activation, bias=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    up = x @ mlp.up.weight.t() + mlp.up.bias
    if activation == "swiglu":
        unit = shard_unit(width)
        gate_rows = [row for row in range(2 * width) if row // unit % 2 == 0]
        up_rows = [row for row in range(2 * width) if row // unit % 2 == 1]
        gate = up[..., gate_rows]
        inner = gate / (1 + torch.exp(-gate)) * up[..., up_rows]
    else:
        inner = (gelu if activation == "gelu" else gelu_tanh)(up)
    torch.testing.assert_close(mlp(x), inner @ mlp.down.weight.t() + mlp.down.bias, rtol=1e-12, atol=1e-12)


def test_residual_rule() -> None:
    stream, branch = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert ResidualRule().join(stream, branch).tolist() == [11.0, 22.0]
    assert ResidualRule(a=0.5, b=2.0).join(stream, branch).tolist() == [20.5, 41.0]
