"""``optimizer.clip_grad_norm`` means the same in every parametrisation: the norm is that of the gradients of
effective weights, near the standard model's at every width and depth, and updates are clipped to it."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from torch import Tensor

from fp8train.config.schema import Config
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, tiny_config

SHAPES = [(32, 2), (128, 2), (32, 6)]
RATES = {"standard": 0.192, "mus": 0.125, "unit_scaling": 0.125}  # of standard: over the width
STEPS, FIRST = 30, 10
LENGTH = 32


def config_of(kind: str, width: int, layers: int, overrides: tuple[str, ...] = ()) -> Config:
    return tiny_config(
        [
            "precision.level=O0",
            "precision.compute=fp32",
            f"parametrization.kind={kind}",
            f"model.hidden_size={width}",
            f"model.ffn_hidden_size={3 * width}",
            f"model.num_layers={layers}",
            *([f"model.init_std={width**-0.5}"] if kind == "standard" else []),
            "train.micro_batch_size=8",
            f"train.steps={STEPS}",
            f"optimizer.lr={RATES[kind] / (width if kind == 'standard' else 1)}",
            "optimizer.clip_grad_norm=0",
            *overrides,
        ]
    )


def text_batches() -> list[Tensor]:
    """int64 [1, 8, LENGTH + 1] for each step: bytes of Python's own source."""
    folder = Path(os.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in ("argparse.py", "inspect.py", "typing.py"))
    tokens, generator = torch.tensor(list(text)), torch.Generator().manual_seed(7)
    starts = torch.randint(len(text) - LENGTH - 1, (STEPS, 1, 8), generator=generator)
    return list(tokens[starts[..., None] + torch.arange(LENGTH + 1)])


def settled_norm(kind: str, shape: tuple[int, int], data: list[Tensor]) -> float:
    """Geometric mean of the logged norm after the first steps."""
    overrides = ("model.vocab_size=256", f"data.seq_length={LENGTH}", f"schedule.warmup_steps={STEPS // 10}")
    trainer = Trainer(config_of(kind, *shape, overrides), alone(), vocab_size=256)
    return geometric_mean([trainer.step(i, tokens).grad_norm for i, tokens in enumerate(data)][FIRST:])


@pytest.mark.slow
def test_norms_are_near_the_standard_one_over_width_and_depth() -> None:
    data = text_batches()
    standard = {shape: settled_norm("standard", shape, data) for shape in SHAPES}
    for kind in ("mus", "unit_scaling"):
        ratios = {shape: settled_norm(kind, shape, data) / standard[shape] for shape in SHAPES}
        print(kind, {shape: f"{ratio:.2f}" for shape, ratio in ratios.items()})
        assert all(0.4 < ratio < 2.5 for ratio in ratios.values()), (kind, ratios)
        assert max(ratios.values()) / min(ratios.values()) < 1.8, (kind, ratios)


@pytest.mark.parametrize("kind", ["standard", "mus", "unit_scaling"])
def test_what_the_optimizer_reads_has_the_threshold_s_norm(kind: str) -> None:
    """The first moment after one step is (1 - beta1) times the clipped gradient."""
    config = config_of(kind, 32, 2, ("optimizer.clip_grad_norm=0.125",))
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    result = trainer.step(0, batches(config, alone()).batch(0))
    rule, specs = trainer.model.parametrization, trainer.model.specs
    moments = {fqn: trainer.optimizer.states.decoded(fqn, "exp_avg").double() / 0.1 for fqn in specs}
    read = sum((rule.norm_weight(specs[fqn]) * float(m.norm())) ** 2 for fqn, m in moments.items()) ** 0.5
    assert result.grad_norm > 0.25
    assert read == pytest.approx(0.125, rel=1e-5)


@pytest.mark.parametrize("kind", ["mus", "unit_scaling"])
def test_below_the_threshold_nothing_is_clipped(kind: str) -> None:
    moments = []
    for clip in ("0", "1000"):
        config = config_of(kind, 32, 2, (f"optimizer.clip_grad_norm={clip}",))
        trainer = Trainer(config, alone(), vocab_size=VOCAB)
        trainer.step(0, batches(config, alone()).batch(0))
        moments.append(trainer.optimizer.states.decoded("head.weight", "exp_avg"))
    assert torch.equal(*moments)


@pytest.mark.parametrize("kind", ["mus", "unit_scaling"])
def test_a_gradient_that_is_not_finite_skips_the_step(kind: str) -> None:
    config = config_of(kind, 32, 2)
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    with torch.no_grad():
        trainer.model.get_parameter("final_norm.weight")[0] = torch.inf
    assert not trainer.step(0, batches(config, alone()).batch(0)).applied
    assert trainer.updates == 0


def test_the_standard_norm_is_the_store_s_own_to_the_bit() -> None:
    config = config_of("standard", 32, 2)
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    norm = trainer.step(0, batches(config, alone()).batch(0)).grad_norm
    assert norm == float(trainer.store.global_norm())
