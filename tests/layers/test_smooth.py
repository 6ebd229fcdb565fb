"""Smooth-SwiGLU: the same function and gradients, less error around an outlier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.layers.linear import Linear
from fp8train.layers.mlp import MLP
from fp8train.layers.smooth import channel_scale, token_scale
from fp8train.precision.linear_gemms import E4M3, LinearQuant
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.precision import Smoothing
from tests.distributed.test_tensor_parallel import WIDE
from tests.layers.connecting import connect
from tests.training.tiny import alone, losses, tiny_config

PLAIN = ["precision.compute=fp64", "precision.gemm.fp8=true"]
VARIANTS = ("token", "channel")


def smoothed(variant: str) -> list[str]:
    return [*PLAIN, f"precision.gemm.smooth_swiglu={variant}"]


def make(dtype: torch.dtype, *, fp8: bool, smooth: Smoothing) -> MLP:
    mlp = MLP(hidden_size=32, ffn_hidden_size=64, activation="swiglu", bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    if fp8:
        connect(mlp.down, LinearQuant(), holding="in_forward" if smooth == "channel" else "cached")
        mlp.use_smooth_swiglu(smooth)
    else:
        mlp.smooth = smooth
    return mlp


def tokens(dtype: torch.dtype) -> Tensor:
    """One token of 16 is 160 times the others: its SwiGLU is 25,000 times theirs."""
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[0, 3] *= 160
    return x.requires_grad_()


def test_scales_are_the_largest_power_of_two() -> None:
    values = torch.tensor(
        [[[0.0, -7.9, 3.0]], [[0.0, 0.0, 0.0]], [[2.0**-130, 0.0, 0.0]], [[1.0, torch.inf, 0.0]]]
    )
    assert token_scale(values, None).flatten().tolist() == [4.0, 1.0, 1.0, 1.0]
    assert channel_scale(values.transpose(0, 2), None).flatten().tolist() == [4.0, 1.0, 1.0, 1.0]


def test_in_high_precision_nothing_changes() -> None:
    results = []
    for smooth in ("off", "token"):
        mlp, x = make(torch.float64, fp8=False, smooth=smooth), tokens(torch.float64)
        y = mlp(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in mlp.parameters())])
    for plain, smooth in zip(*results, strict=True):
        torch.testing.assert_close(smooth, plain, rtol=1e-12, atol=1e-12)


WITH_MARGIN = QuantSpec(E4M3, margin=1)


@pytest.mark.parametrize(
    "quant",
    [
        LinearQuant(),
        LinearQuant(keep_w="bf16"),
        LinearQuant(keep_w="second_copy", grad_input_w=WITH_MARGIN),
        LinearQuant(keep_w="requantise", grad_input_w=WITH_MARGIN),
        LinearQuant(keep_x="bf16", grad_weight_fp8=False),
        LinearQuant(keep_x="second_copy", grad_weight_x=WITH_MARGIN),
        replace(LinearQuant(), output_x=QuantSpec(E4M3, granularity="row"), keep_x="bf16"),
    ],
    ids=lambda quant: f"w {quant.keep_w}, x {quant.keep_x}",
)
@pytest.mark.parametrize("in_features", [16, 20], ids=["aligned", "padded"])
def test_factors_of_columns_change_nothing_where_fp8_is_exact(quant: LinearQuant, in_features: int) -> None:
    """Integers of few bits times powers of two: every cast is exact, and so is every sum in FP64."""
    generator = torch.Generator().manual_seed(11)

    def integers(*shape: int, largest: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator).double()

    columns = 2.0 ** torch.randint(-3, 4, (in_features,), generator=generator).double()
    x, weight = integers(24, in_features, largest=7) * columns, integers(12, in_features, largest=3)
    grad_output = integers(24, 12, largest=2)
    linear = Linear(in_features, 12, bias=False, dtype=torch.float64)
    connect(linear, quant, holding="in_forward")
    with torch.no_grad():
        linear.weight.copy_(weight)
    source = x.clone().requires_grad_()
    y = linear(source / columns, columns=columns)
    y.backward(grad_output)
    assert torch.equal(y, x @ weight.t())
    assert torch.equal(source.grad, grad_output @ weight)
    assert torch.equal(linear.weight.grad, grad_output.t() @ x)


def test_an_outlier_token_costs_its_own_token_alone() -> None:
    exact = make(torch.float64, fp8=False, smooth="off")(tokens(torch.float64))
    error = {}
    for smooth in ("off", "token"):
        y = make(torch.float32, fp8=True, smooth=smooth)(tokens(torch.float32))
        others = torch.ones(2, 8, dtype=torch.bool)
        others[0, 3] = False
        difference = (y.detach().double() - exact.detach())[others]
        error[smooth] = float(difference.square().sum() / exact.detach()[others].square().sum())
    assert error["token"] < 2e-3, error
    assert error["off"] > 4 * error["token"], error


def test_an_outlier_channel_leaves_the_others_their_precision() -> None:
    """A channel 2^18 times the rest, whose weight makes up for it: one scale flushes all other channels."""

    def outlier(mlp: MLP) -> MLP:
        with torch.no_grad():
            row = mlp.unit + 5  # the up half of channel 5
            mlp.up.weight[row] *= 2.0**18
            mlp.down.weight[:, 5] *= 2.0**-18
        return mlp

    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5))
    exact = outlier(make(torch.float64, fp8=False, smooth="off"))(x.double()).detach()
    error = {}
    for smooth in ("off", *VARIANTS):
        y = outlier(make(torch.float32, fp8=True, smooth=smooth))(x)
        error[smooth] = float((y.detach() - exact).square().sum() / exact.square().sum())
    assert error["channel"] < 3e-3, error
    assert min(error["off"], error["token"]) > 50 * error["channel"], error


def smooth_losses(
    group: dist.ProcessGroup, rank: int, world_size: int, variant: str, axis: str
) -> list[float]:
    """Runs in the pool."""
    processes = joined_processes(torch.device("cpu"), Layout(**{axis: 2}))
    return losses(tiny_config([*smoothed(variant), f"parallel.{axis}=2"], **WIDE), processes, 3)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_refused_where_no_down_projection_is_in_fp8(variant: str) -> None:
    with pytest.raises(ConfigError, match=r"smooth_swiglu .*exclude, which recipe: umup fills.* remove one"):
        losses(tiny_config(["precision.recipe=umup", *smoothed(variant)]), alone(), 1)
    config = tiny_config([*smoothed(variant), "precision.gemm.first_layers_bf16=1"])
    _, trainer = losses(config, alone(), 1)
    assert [block.mlp.smooth for block in trainer.model.held_blocks()] == ["off", variant]


def test_a_channel_s_size_cannot_move_into_a_weight_that_exists_in_fp8_alone() -> None:
    with pytest.raises(ConfigError, match=r"smooth_swiglu: channel .*weights is fp8; write weights"):
        tiny_config(["precision.level=O3", "precision.gemm.smooth_swiglu=channel"])
    older = tiny_config(["precision.level=O1", "precision.gemm.smooth_swiglu=true"])
    assert older.precision.gemm.smooth_swiglu == "token"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("variant", "axis"), [("token", "tp"), ("channel", "tp"), ("channel", "cp")])
def test_ranks_agree_on_the_factors(gloo_pool, variant: str, axis: str) -> None:
    expected = losses(tiny_config(smoothed(variant), **WIDE), alone(), 3)[0]
    plain = losses(tiny_config(PLAIN, **WIDE), alone(), 3)[0]
    assert expected != plain
    for found in gloo_pool.run(smooth_losses, 2, variant, axis, timeout=200.0):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("recipe", ["te_delayed", "rowwise", "mus"])
def test_a_channel_s_size_moves_under_every_kind_of_scale(recipe: str) -> None:
    """Powers of two change nothing but what falls below FP8's normal range, which is little here."""
    overrides = [f"precision.recipe={recipe}", "precision.level=O1", "precision.weights=compute"]
    smooth = [*overrides, "precision.gemm.smooth_swiglu=channel"]
    untied = {"model": {**tiny_config().model.model_dump(exclude_unset=True), "tie_embeddings": False}}
    sections = untied if recipe == "mus" else {}
    plain = losses(tiny_config(overrides, **sections), alone(), 2)[0]
    found, trainer = losses(tiny_config(smooth, **sections), alone(), 2)
    assert found == pytest.approx(plain, rel=1e-3)
    downs = [block.mlp.down for block in trainer.model.held_blocks()]
    assert all(linear.casts_in_forward for linear in downs)
    if recipe == "te_delayed":  # its history knows what was cast: the weight times its factors
        history = trainer.scales.state_tensors()["scale_state/amax_history/layers.0.mlp.down/output.w"]
        assert 0 < history[0] < 0.2 * downs[0].weight.abs().max()
