"""Training with an FP8 head: what is told of it, what changes, and what does not."""

from __future__ import annotations

import pytest
import torch

from fp8train.config.errors import ConfigError
from fp8train.live.describe import describe_precision
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, losses, tiny_config

HEAD = "precision.gemm.head=fp8"
O2 = "precision.level=O2"


def test_it_learns_like_the_other() -> None:
    """Codes of 3 bits of mantissa move a loss of about 4 nats by less than a percent, but move it."""
    short = [O2, "train.micro_batch_size=8"]
    plain, _ = losses(tiny_config(short), alone(), 12)
    found, trainer = losses(tiny_config([*short, HEAD]), alone(), 12)
    assert found[0] != plain[0]
    assert found[0] == pytest.approx(plain[0], rel=5e-3)
    assert found[-1] < 0.9 * found[0]
    assert found[-1] == pytest.approx(plain[-1], rel=0.05)
    assert "FP8: 9 of 9 linears" in "\n".join(describe_precision(trainer))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_checkpoints_do_not_change(tied: str) -> None:
    trainers = [
        Trainer(tiny_config([O2, f"model.tie_embeddings={tied}", *more]), alone(), vocab_size=VOCAB)
        for more in ((), (HEAD,))
    ]
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in trainer.optimizer.states.tensors().items()}
        for trainer in trainers
    ]
    assert shapes[0] == shapes[1]
    specs = [{fqn: spec.in_fp8_plan for fqn, spec in trainer.outline.specs.items()} for trainer in trainers]
    assert specs[0] == specs[1]


def test_validation_has_the_numerics_of_training() -> None:
    """The first loss of training, from a forward under no_grad."""
    config = tiny_config([O2, HEAD, "train.micro_batch_size=8"])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    batch = batches(config, alone()).batch(0)
    inputs, targets = batch[..., :-1], batch[..., 1:]
    with torch.no_grad():
        expected = float(trainer.summed_loss(inputs, targets)) / targets.numel()
    assert float(trainer.step(0, batch).loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("precision.level=O0",), r"precision\.gemm\.head.* has no effect: precision\.gemm\.fp8 is false"),
        (
            (O2, "precision.recipe=nvfp4_simulated"),
            r"precision\.gemm\.head.* has no effect: precision\.gemm\.output\.x\.format is e2m1",
        ),
    ],
)
def test_where_nothing_reads_it_it_is_refused(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        tiny_config([*overrides, HEAD])
    tiny_config(overrides)
