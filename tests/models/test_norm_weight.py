"""The weights of gradients in the global norm make them the gradients of effective weights: against finite
differences of the loss in FP64, along random directions of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp8train.models.decoder import Decoder
from tests.models.settings import gradients, random_tokens, tiny_config, tiny_model

HEAD = {"mus": 1 / 32, "unit_scaling": 32**-0.5, "umup": 1 / 32}
GPT = {"family": "gpt"}
LLAMA = {"family": "llama", "num_kv_heads": 2, "qk_norm": "gain"}


def alpha(recipe: str, fqn: str, parameter: torch.Tensor, *, geometric: bool) -> float:
    """What the parameter is multiplied by where it is used, by the papers' tables."""
    if fqn == "head.weight":
        return HEAD[recipe]
    if not fqn.startswith("layers.") or parameter.dim() == 1:
        return 1.0
    fan_out, fan_in = parameter.shape
    return float((fan_in * fan_out) ** -0.25 if geometric else fan_in**-0.5)


def slope(decoder: Decoder, fqn: str, direction: torch.Tensor, step: float = 1e-5) -> float:
    """Derivative of the mean loss along ``direction``."""
    tokens, targets = random_tokens(2, 24), random_tokens(2, 24, seed=4)
    parameter, values = decoder.get_parameter(fqn), []
    with torch.no_grad():
        for sign in (1, -2):
            parameter.add_(sign * step * direction)
            values.append(float(decoder(tokens, targets)) / targets.numel())
        parameter.add_(step * direction)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(
    ("recipe", "model", "settings"),
    [
        ("mus", GPT, {}),
        ("mus", LLAMA, {"loss_mult": 2.0}),
        ("unit_scaling", GPT, {"constraint": "geometric_mean"}),
        ("unit_scaling", LLAMA, {"residual": "plain"}),
        ("umup", GPT, {"residual_mult": 2.0, "residual_attention_ratio": 0.5}),
        ("umup", LLAMA, {"loss_mult": 2.0}),
    ],
)
def test_weights_make_gradients_those_of_effective_weights(
    recipe: str, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = tiny_config(
        {**model, "norm_gain": True},
        precision={"recipe": recipe, "compute": "fp64"},
        parametrization=settings,
    )
    decoder = tiny_model(config)
    rule = decoder.parametrization
    found = gradients(decoder, random_tokens(2, 24), random_tokens(2, 24, seed=4))
    generator = torch.Generator().manual_seed(11)
    for fqn, parameter in decoder.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # The trainer's gradients are those of S times the mean loss, and it divides true ones by S.
        scale = 1.0 if recipe == "mus" else 48.0
        weighted = rule.norm_weight(decoder.specs[fqn]) * scale * float((found[fqn] * direction).sum())
        geometric = config.parametrization.constraint == "geometric_mean"
        multiplier = alpha(recipe, fqn, parameter, geometric=geometric)
        expected = slope(decoder, fqn, direction) / multiplier
        assert weighted == pytest.approx(expected, rel=2e-3, abs=1e-9), fqn


def test_the_standard_parametrisation_weighs_nothing() -> None:
    decoder = tiny_model(tiny_config(GPT, parametrization={"loss_mult": 2.0}))
    assert {decoder.parametrization.norm_weight(spec) for spec in decoder.specs.values()} == {1.0}
