"""Checkpoints that an earlier program wrote are read, to the bit, and runs go on from them."""

from pathlib import Path

import pytest
import torch

from fp8train.checkpoint.load import open_checkpoint
from fp8train.checkpoint.save import save_checkpoint
from fp8train.config.resolve import load_config
from fp8train.step.trainer import Trainer
from fp8train.training.restore import restore
from tests.checkpoint.kept import LEVELS, STEP, VOCAB, digests, expected, losses, train, unpack, write_config
from tests.training.tiny import alone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("level", LEVELS)
def test_every_state_is_taken_over_to_the_bit(tmp_path: Path, level: str) -> None:
    """Loaded into a trainer and saved again, the tensors are those that were stored."""
    opened = open_checkpoint(unpack(level, tmp_path), group=None)
    assert digests(opened) == expected(level)["tensors"]
    config = load_config(write_config(tmp_path), [f"precision.level={level}"]).config
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    done = restore(trainer, opened, roles=trainer.optimizer.states.roles, scales=True, reshard="refuse")
    assert not done.recasts
    assert not done.fresh
    again = save_checkpoint(
        tmp_path / "again",
        STEP,
        trainer.checkpoint_tensors(),
        meta={},
        rank_state={},
        group=None,
        keep_last=1,
    )
    assert digests(open_checkpoint(again, group=None)) == expected(level)["tensors"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_goes_on_from_it(tmp_path: Path, level: str) -> None:
    """The losses of the run that was never interrupted; kernels of another machine may round otherwise."""
    path = unpack(level, tmp_path)
    run = train(write_config(tmp_path), "more", f"precision.level={level}", f"checkpoint.resume={path}")
    torch.testing.assert_close(losses(run), expected(level)["losses"], rtol=0, atol=1e-3)
    assert len(losses(run)) == 2
