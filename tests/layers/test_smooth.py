"""Smooth-SwiGLU: the same function and gradients, less error around an outlier."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.kernels.gemm import GemmBackend
from fp8train.layers.linear import Fp8Plan
from fp8train.layers.mlp import MLP
from fp8train.layers.smooth import token_scale
from fp8train.numerics.quant_spec import LinearQuant
from tests.distributed.test_tensor_parallel import WIDE
from tests.training.tiny import alone, losses, tiny_config

OVERRIDES = ["precision.compute=fp64", "precision.gemm.fp8=true", "precision.gemm.smooth_swiglu=true"]


def make(dtype: torch.dtype, *, fp8: bool, smooth: bool) -> MLP:
    mlp = MLP(hidden_size=32, ffn_hidden_size=64, activation="swiglu", bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    if fp8:
        mlp.down.use_fp8(Fp8Plan(LinearQuant(), GemmBackend("decode", "test")))
    mlp.smooth = smooth
    return mlp


def tokens(dtype: torch.dtype) -> Tensor:
    """One token of 16 is 160 times the others: its SwiGLU is 25,000 times theirs."""
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[0, 3] *= 160
    return x.requires_grad_()


def test_scales_are_the_token_s_largest_power_of_two() -> None:
    up = torch.tensor(
        [[[0.0, -7.9, 3.0]], [[0.0, 0.0, 0.0]], [[2.0**-130, 0.0, 0.0]], [[1.0, torch.inf, 0.0]]]
    )
    assert token_scale(up, None).flatten().tolist() == [4.0, 1.0, 1.0, 1.0]


def test_in_high_precision_nothing_changes() -> None:
    results = []
    for smooth in (False, True):
        mlp, x = make(torch.float64, fp8=False, smooth=smooth), tokens(torch.float64)
        y = mlp(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in mlp.parameters())])
    for plain, smooth in zip(*results, strict=True):
        torch.testing.assert_close(smooth, plain, rtol=1e-12, atol=1e-12)


def test_an_outlier_costs_its_own_token_alone() -> None:
    exact = make(torch.float64, fp8=False, smooth=False)(tokens(torch.float64))
    error = {}
    for smooth in (False, True):
        y = make(torch.float32, fp8=True, smooth=smooth)(tokens(torch.float32))
        others = torch.ones(2, 8, dtype=torch.bool)
        others[0, 3] = False
        difference = (y.detach().double() - exact.detach())[others]
        error[smooth] = float(difference.square().sum() / exact.detach()[others].square().sum())
    assert error[True] < 2e-3, error
    assert error[False] > 4 * error[True], error


def smooth_losses(group: dist.ProcessGroup, rank: int, world_size: int) -> list[float]:
    """Runs in the pool."""
    processes = joined_processes(torch.device("cpu"), Layout(tp=2))
    return losses(tiny_config([*OVERRIDES, "parallel.tp=2"], **WIDE), processes, 3)[0]


def test_it_is_refused_where_no_down_projection_is_in_fp8() -> None:
    with pytest.raises(ConfigError, match=r"smooth_swiglu .*exclude, which recipe: umup fills.* remove one"):
        losses(tiny_config(["precision.recipe=umup", *OVERRIDES]), alone(), 1)
    config = tiny_config([*OVERRIDES, "precision.gemm.first_layers_bf16=1"])
    _, trainer = losses(config, alone(), 1)
    assert [block.mlp.smooth for block in trainer.model.held_blocks()] == [False, True]


@pytest.mark.usefixtures("one_thread")
def test_tensor_parallel_ranks_agree_on_a_token_s_scale(gloo_pool) -> None:
    expected = losses(tiny_config(OVERRIDES, **WIDE), alone(), 3)[0]
    plain = losses(tiny_config(OVERRIDES[:2], **WIDE), alone(), 3)[0]
    assert expected != plain
    for found in gloo_pool.run(smooth_losses, 2, timeout=200.0):
        assert found == pytest.approx(expected, rel=1e-12)
