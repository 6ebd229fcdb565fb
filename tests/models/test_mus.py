"""μnit Scaling against a model written here, in plain FP64 operations, from the paper's scaling table; and
its gradient scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.config.schema import Config
from fp8train.models.build import build_model, initialise, parametrization
from fp8train.models.decoder import Decoder
from fp8train.models.parametrization import default_tau
from fp8train.step.trainer import Trainer
from tests.models.settings import VOCAB_SIZE, gradients, random_tokens, tiny_config, tiny_model
from tests.training.tiny import alone, batches, losses
from tests.training.tiny import tiny_config as training_config

LENGTH = 12


def mus_config(model: dict[str, Any], **parametrization: Any) -> Config:
    config = tiny_config(model, precision={"recipe": "mus", "compute": "fp64"})
    section = config.parametrization.model_copy(update=parametrization)
    return config.model_copy(update={"parametrization": section})


def reference_loss(model: Decoder, weights: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """The summed loss, from the table alone. Weights [N, K]; no KV groups, no biases."""
    c = model.config
    tau = 0.4  # two blocks
    heads, dim, unit = c.num_heads, c.head_dim, model.layers["0"].mlp.unit
    batch, length = tokens.shape

    def linear(x: Tensor, name: str) -> Tensor:
        w = weights[name]
        return x @ w.T / math.sqrt(w.shape[1])

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + c.norm_eps) * weights[name]

    def rotate(x: Tensor) -> Tensor:  # [B, heads, S, D]
        angles = (
            torch.arange(length)[:, None] * c.rope_theta ** (-torch.arange(0, dim, 2) / dim)[None, :].double()
        )
        first, second = x.chunk(2, -1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    def attention(x: Tensor, layer: str) -> Tensor:
        grouped = linear(x, f"{layer}.attention.qkv.weight").view(batch, length, heads, 3, dim)
        q, k, v = (grouped[:, :, :, i].transpose(1, 2) for i in range(3))
        if c.positions == "rope":
            q, k = rotate(q), rotate(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
        scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -math.inf)
        mixed = torch.softmax(scores, -1) @ v
        return linear(
            mixed.transpose(1, 2).reshape(batch, length, heads * dim), f"{layer}.attention.out.weight"
        )

    def mlp(x: Tensor, layer: str) -> Tensor:
        up = linear(x, f"{layer}.mlp.up.weight")
        if c.activation == "swiglu":
            halves = up.unflatten(-1, (-1, 2, unit))
            up = 2**0.75 * (F.silu(halves[..., 0, :]) * halves[..., 1, :]).flatten(-2)  # 1.682
        else:
            up = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
        return linear(up, f"{layer}.mlp.down.weight")

    x = weights["embedding.weight"][tokens]
    if c.positions == "learned":
        x = (x + weights["positions.weight"][:length]) / math.sqrt(2)
    for i in range(c.num_layers):
        for branch, gain in ((attention, "attention_norm"), (mlp, "mlp_norm")):
            out = norm(branch(x, f"layers.{i}"), f"layers.{i}.{gain}.weight")
            x = math.sqrt(1 - tau) * x + math.sqrt(tau) * out
    logits = norm(x, "final_norm.weight") @ weights["head.weight"].T / c.hidden_size
    return F.cross_entropy(logits[..., :VOCAB_SIZE].flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize(
    "model",
    [{"family": "llama"}, {"family": "gpt", "bias": False}],
    ids=["llama", "gpt"],
)
def test_forward_and_backward_are_those_of_the_scaling_table(model: dict[str, Any]) -> None:
    decoder = tiny_model(mus_config(model))
    tokens, targets = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=4)
    weights = {fqn: p.detach().clone().requires_grad_() for fqn, p in decoder.named_parameters()}
    expected = reference_loss(decoder, weights, tokens, targets)
    assert float(decoder(tokens, targets)) == pytest.approx(float(expected.detach()), rel=1e-12)
    found = gradients(decoder, tokens, targets)
    (expected / targets.numel()).backward()
    for fqn, weight in weights.items():
        torch.testing.assert_close(found[fqn], weight.grad, rtol=1e-9, atol=1e-14, msg=fqn)


def test_values_of_step_0_rates_and_decay() -> None:
    config = mus_config({"family": "llama", "hidden_size": 64})
    decoder = build_model(config, vocab_size=VOCAB_SIZE, device=torch.device("cpu")).model
    initialise(decoder, 3)
    for fqn, parameter in decoder.named_parameters():
        spec = decoder.specs[fqn]
        hidden = fqn.startswith("layers.") and "norm" not in fqn
        assert spec.lr_mult == ((256 / 64) ** 0.5 if hidden else 1.0), fqn
        assert spec.decay == "fully_decoupled", fqn
        if parameter.dim() == 2:
            assert float(parameter.std()) == pytest.approx(1.0, abs=0.05), fqn
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), fqn


def test_tau_of_the_depths_in_the_table_and_between() -> None:
    assert [default_tau(depth) for depth in (1, 4, 24, 32, 40, 100, 300)] == [
        0.4,
        0.4,
        0.3,
        0.3,
        0.2,
        0.1,
        0.1,
    ]
    assert default_tau(8) == pytest.approx(0.4 - 0.1 * math.log(8 / 4) / math.log(24 / 4))
    assert default_tau(36) > 0.2


@pytest.mark.parametrize("recipe", ["mus", "umup"])
def test_the_gradient_scale_comes_from_the_configuration(recipe: str) -> None:
    config = training_config([f"precision.recipe={recipe}"])
    tokens = 8 * 16  # global batch, whatever the micro-batch
    # less half of 2 blocks' growth, log2(1 + 1.4 · 0.4) / 2 each
    expected = 2.0 ** (3 + round(math.log2(tokens * 32)) - round(0.32)) if recipe == "mus" else tokens
    assert parametrization(config, 64).gradient_scale == expected
    more = training_config([f"precision.recipe={recipe}", "train.micro_batch_size=4"])
    assert parametrization(more, 64).gradient_scale == expected


@pytest.mark.parametrize(
    ("family", "layers", "less"), [("llama", 4, 1), ("llama", 24, 3), ("llama", 100, 5), ("gpt", 100, 0)]
)
def test_the_gradient_scale_leaves_room_for_what_swiglu_adds(family: str, layers: int, less: int) -> None:
    overrides = ["precision.recipe=mus", f"model.family={family}", f"model.num_layers={layers}"]
    found = parametrization(training_config(overrides), 64).gradient_scale
    assert found == 2.0 ** (3 + round(math.log2(8 * 16 * 32)) - less)


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("batch", [8, 64])
def test_eps_damps_no_updates_of_wide_models_and_large_batches(width: int, batch: int) -> None:
    """AdamW's first update is g / (|g| + eps): true gradients fall by width^1.5 and more with the batch, S
    times them do not."""
    overrides = ["precision.recipe=mus", "precision.compute=fp32", "optimizer.eps=1e-2"]
    overrides += [f"model.hidden_size={width}", f"train.global_batch_size={batch}"]
    overrides += ["optimizer.lr=0.01", "optimizer.weight_decay=0", "schedule.kind=constant"]
    overrides += ["schedule.warmup_steps=0", "optimizer.clip_grad_norm=0"]
    config = training_config(overrides)
    trainer = Trainer(config, alone(), vocab_size=64)
    weight = trainer.model.get_parameter("layers.0.mlp.up.weight")
    before = weight.detach().clone()
    trainer.step(0, batches(config, alone()).batch(0))
    moved = (weight.detach() - before).abs() / (0.01 * trainer.model.specs["layers.0.mlp.up.weight"].lr_mult)
    assert 0.9 < float(moved.mean()) <= 1


def test_dividing_by_a_power_of_two_changes_nothing_but_what_rounds_to_zero() -> None:
    """In FP64 without FP8, S = 1 and S = 2^15 train alike to the bit, clipping included."""
    runs = {}
    for exponent in (0, 15):
        config = training_config(
            [
                "precision.recipe=mus",
                "precision.compute=fp64",
                f"parametrization.gradient_scale_exponent={exponent}",
                f"optimizer.eps={1e-8 * 2.0**exponent}",
                "optimizer.lr=0.03",
                "optimizer.clip_grad_norm=0.05",
            ]
        )
        runs[exponent] = losses(config, alone(), 4)[0]
    assert runs[0] == runs[15]


def test_the_logged_norm_is_that_of_the_true_gradients() -> None:
    norms = {}
    for exponent in (0, 15):
        config = training_config(
            ["precision.recipe=mus", f"parametrization.gradient_scale_exponent={exponent}"]
        )
        trainer = Trainer(config, alone(), vocab_size=64)
        norms[exponent] = trainer.step(0, batches(config, alone()).batch(0)).grad_norm
    assert norms[15] == pytest.approx(norms[0], rel=1e-3)


def test_constants_of_unit_scaling_multiply_each_parameter_s_true_gradient() -> None:
    """Against finite differences of the loss in FP64, along random directions per parameter."""
    for recipe, model in (("umup", {"family": "llama"}), ("unit_scaling", {"family": "gpt"})):
        config = tiny_config(model, precision={"recipe": recipe, "compute": "fp64"})
        decoder = tiny_model(config)
        tokens, targets = random_tokens(2, LENGTH), random_tokens(2, LENGTH, seed=4)
        found = gradients(decoder, tokens, targets)
        generator = torch.Generator().manual_seed(11)
        for fqn, parameter in decoder.named_parameters():
            ratios = []
            for _ in range(3):
                direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                slope = _slope(decoder, parameter, direction, tokens, targets)
                ratios.append(float((found[fqn] * direction).sum()) / slope)
            assert ratios[0] > 0, fqn
            assert ratios == pytest.approx([ratios[0]] * 3, rel=2e-4), f"{recipe} {fqn}: {ratios}"


def _slope(
    decoder: Decoder,
    parameter: Tensor,
    direction: Tensor,
    tokens: Tensor,
    targets: Tensor,
    step: float = 1e-5,
) -> float:
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(sign * step * direction)
            values.append(float(decoder(tokens, targets)) / targets.numel())
            parameter.sub_(sign * step * direction)
    return (values[0] - values[1]) / (2 * step)
