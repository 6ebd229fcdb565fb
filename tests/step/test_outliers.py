"""Monitors of outliers find where one was put, under every recipe; static recipes train with either rule."""

from __future__ import annotations

import pytest
import torch

from fp8train.config.recipe_registry import RECIPES
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, losses, tiny_config

IN_CI = ("current", "rowwise", "mus")
MARKED = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in RECIPES]


def trainer_of(*overrides: str) -> Trainer:
    settings = ["precision.level=O0", "precision.gemm.fp8=true", "logging.cast_statistics_interval=1"]
    wide = ["model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_layers=3"]
    return Trainer(tiny_config([*settings, *wide, *overrides]), alone(), vocab_size=VOCAB)


@pytest.mark.parametrize("recipe", MARKED)
def test_an_outlier_channel_has_the_largest_kurtosis(recipe: str) -> None:
    """Gate and up rows of one channel of one block aligned and large, as weight decay does to SwiGLU."""
    trainer = trainer_of(f"precision.recipe={recipe}", "precision.gemm.exclude=[layers.0.attention.qkv]")
    assert trainer.monitors.recorder is not None
    mlp = trainer.model.held_blocks()[1].mlp
    with torch.no_grad():
        gate, up = mlp.up.weight.unflatten(0, (-1, 2, mlp.unit))[0].unbind(0)
        gate[3] *= 8
        up[3] = gate[3]
    trainer.monitors.recorder.active = True
    trainer.step(0, batches(trainer.config, alone()).batch(0))
    kurtosis = {
        site: row["kurtosis"] for site, row in trainer.monitors.cast_rows().items() if site.endswith("/x")
    }
    assert max(kurtosis, key=lambda site: kurtosis[site]) == "layers.1.mlp.down/x", kurtosis
    others = max(value for site, value in kurtosis.items() if site != "layers.1.mlp.down/x")
    assert kurtosis["layers.1.mlp.down/x"] > 1.5 * others


@pytest.mark.parametrize("overrides", [[], ["precision.recipe=mus"], ["precision.level=O3"]])
def test_the_query_norm_of_a_head_that_grew_is_logged(overrides: list[str]) -> None:
    trainer = trainer_of(*overrides)
    before = trainer.monitors.attention_metrics()["train/query_norm_max"]
    qkv = trainer.model.held_blocks()[2].attention.qkv
    grown = qkv.dequantized_weight(torch.float32).clone()
    grown[: trainer.model.config.head_dim] *= 10
    if qkv.fp8_weight_is_resident:
        trainer.parts.resident["layers.2.attention.qkv.weight"].fill(grown)
    else:
        with torch.no_grad():
            qkv.weight.copy_(grown)
    assert trainer.monitors.attention_metrics()["train/query_norm_max"] > 5 * before


@pytest.mark.parametrize(
    ("recipe", "optimizer", "lr"), [("mus", "lion", 0.01), ("umup", "lion", 0.1), ("mus", "adamw", 0.06)]
)
def test_static_recipes_train_with_adamw_and_lion(recipe: str, optimizer: str, lr: float) -> None:
    config = tiny_config(
        [
            f"precision.recipe={recipe}",
            "precision.level=O2",
            f"optimizer.name={optimizer}",
            f"optimizer.lr={lr}",
        ]
    )
    found, _ = losses(config, alone(), 20)
    assert found[-1] < found[0] - 0.25, found
