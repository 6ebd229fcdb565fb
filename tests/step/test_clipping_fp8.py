"""Clipping covers FP8 gradients: they count in the norm, and the multiplier reaches them.

MS-AMP's Megatron path collected them for clipping and never scaled them.
"""

from __future__ import annotations

import pytest
import torch

from fp8train.step.trainer import Trainer
from tests.parallel.gradients.reading import gradient_of
from tests.training.tiny import VOCAB, alone, batches, tiny_config

REDUCTIONS = {
    "exchange": [],
    "shared_scale": ["precision.profile=paper"],
    "exact": ["precision.gradient.fp8.reduce=exact", "run.threads=1"],
}


def first_moments(overrides: list[str], clip: float) -> tuple[dict[str, torch.Tensor], float, float]:
    """(first moments after one step by name, norm reported, norm by FP64 over all stored gradients)."""
    config = tiny_config(["precision.level=O1", f"optimizer.clip_grad_norm={clip}", *overrides])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    norm = trainer.step(0, batches(config, alone()).batch(0)).grad_norm
    names = [fqn for fqn, _ in trainer.model.named_parameters()]
    squares = sum(float(gradient_of(trainer.store, fqn).double().square().sum()) for fqn in names)
    return {fqn: trainer.optimizer.states.decoded(fqn, "exp_avg") for fqn in names}, norm, squares**0.5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_clipping_scales_fp8_gradients_like_all_others(reduction: str) -> None:
    free, norm, expected = first_moments(REDUCTIONS[reduction], 0.0)
    assert norm == pytest.approx(expected, rel=1e-6)
    clipped, same_norm, _ = first_moments(REDUCTIONS[reduction], norm / 8)
    assert same_norm == norm
    assert any(name.endswith("qkv.weight") for name in clipped)
    for fqn, moment in clipped.items():
        # The first moment after one step is (1 - beta1) times the clipped gradient.
        torch.testing.assert_close(moment, free[fqn] / 8, rtol=1e-5, atol=1e-12, msg=fqn)
