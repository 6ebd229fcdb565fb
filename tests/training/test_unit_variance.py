"""Static recipes at step 0: every cast site near unit variance, next to nothing flushed, nothing
saturated."""

from __future__ import annotations

import os

import pytest
import torch

from fp8train.training.trainer import Trainer
from tests.training.tiny import alone, tiny_config

VOCAB, LENGTH = 512, 64
DEEP = [(layers, width) for layers in (4, 24, 100) for width in (64, 256, 1024)]


def cast_rows(
    recipe: str, family: str, layers: int, width: int, *overrides: str
) -> dict[str, dict[str, float]]:
    """Statistics of every cast of one step on random tokens, by site."""
    config = tiny_config(
        [
            f"precision.recipe={recipe}",
            "precision.level=O1",
            "precision.weights=compute",  # its statistics are taken where it is cast, in the forward
            f"model.family={family}",
            f"model.num_layers={layers}",
            f"model.hidden_size={width}",
            f"model.ffn_hidden_size={width * (4 if family == 'gpt' else 3)}",
            f"model.num_heads={width // 16}",
            f"model.num_kv_heads={width // 16}",
            f"model.vocab_size={VOCAB}",
            f"data.seq_length={LENGTH}",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "logging.cast_statistics_interval=1",
            *overrides,
        ]
    )
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    assert trainer.monitors.recorder is not None
    trainer.monitors.recorder.active = True
    tokens = torch.randint(VOCAB, (2, 2, LENGTH + 1), generator=torch.Generator().manual_seed(7))
    assert trainer.step(0, tokens).applied
    return {
        site: row for site, row in trainer.monitors.cast_rows().items() if not site.endswith("grad_weight")
    }


def check(recipe: str, family: str, layers: int, width: int) -> None:
    rows = cast_rows(recipe, family, layers, width)
    assert len(rows) == layers * 3 * (2 if recipe == "umup" else 4)
    for site, row in rows.items():
        # True gradients of a deep SwiGLU model grow towards the input: each MLP's Jacobian has a gain above
        # 1, as its output is quadratic. One constant S cannot level that; E5M2 has room for it.
        low, high = (2**-8, 2**10) if recipe == "mus" and site.endswith("grad_output") else (0.1, 10)
        assert low < row["rms"] < high, f"{site}: rms {row['rms']}"
        assert row["flushed"] < 0.01, f"{site}: {row['flushed']:.2%} flushed"
        assert row["saturated"] == 0, f"{site}: {row['saturated']:.2%} saturated"


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("recipe", ["mus", "umup", "unit_scaling"])
def test_every_cast_site_is_near_unit_variance(recipe: str, family: str) -> None:
    check(recipe, family, 4, 64)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layers", "width"), DEEP[1:])
@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("recipe", ["mus", "umup", "unit_scaling"])
def test_every_depth_and_width(recipe: str, family: str, layers: int, width: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    needed = 32 if (layers, width) == (100, 1024) else 8  # 1.4 billion parameters at 16 bytes
    if memory < needed:
        pytest.skip(f"needs {needed} GiB of memory, this machine has {memory:.0f}")
    check(recipe, family, layers, width)


def test_without_the_gradient_scale_most_gradients_would_be_flushed() -> None:
    """What S is for: a mean loss's gradients are below E5M2's range, and more so the wider the model."""
    rows = cast_rows("mus", "gpt", 2, 256, "parametrization.gradient_scale_exponent=0")
    flushed = [row["flushed"] for site, row in rows.items() if site.endswith("/grad_output")]
    assert min(flushed) > 0.1, flushed
    assert max(flushed) > 0.8, flushed
