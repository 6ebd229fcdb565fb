"""Steps that change nothing, at two ranks: a global batch without a target, and a gradient that is not
finite on one rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.comm.processes import joined_processes
from fp8train.deepspeed_engine.trainer import DeepSpeedTrainer
from tests.deepspeed_engine.two_ranks import needs_deepspeed, on_two_ranks
from tests.training.tiny import VOCAB, tiny_config

pytestmark = [*needs_deepspeed, pytest.mark.slow]

CASES = [(stage, compute) for stage in (1, 2, 3) for compute in ("fp32", "bf16")]
END = 0  # after it a target is left out


def states(trainer: DeepSpeedTrainer) -> dict[str, Tensor]:
    trainer.pull()
    return {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def steps(rank: int) -> dict[tuple[int, str], dict[str, Any]]:
    found = {}
    processes = joined_processes(torch.device("cpu"))
    for stage, compute in CASES:
        overrides = ["engine=deepspeed", f"parallel.zero={stage}", f"precision.compute={compute}"]
        config = tiny_config([*overrides, "train.global_batch_size=8"])
        trainer = DeepSpeedTrainer(config, processes, vocab_size=VOCAB, ignore_after=END)
        shape = (
            4 // config.train.micro_batch_size,
            config.train.micro_batch_size,
            config.data.seq_length + 1,
        )
        generator = torch.Generator().manual_seed(rank)
        batch = torch.randint(1, VOCAB, shape, generator=generator)
        first, before = trainer.step(0, batch), states(trainer)
        empty = trainer.step(1, torch.full(shape, END))
        after_empty = equal(before, states(trainer))
        norm = trainer.model.final_norm.weight
        handle = None
        if rank == 1:
            handle = trainer.model.layers["0"].register_forward_hook(lambda *args: args[-1] * math.nan)
        broken = trainer.step(2, batch)
        if handle is not None:
            handle.remove()
        after_broken = equal(before, states(trainer))
        again = trainer.step(3, batch)
        found[stage, compute] = {
            "applied": [result.applied for result in (first, empty, broken, again)],
            "no_targets": [result.no_targets for result in (first, empty, broken, again)],
            "unchanged": (after_empty, after_broken),
            "losses": [float(result.loss) for result in (first, empty, broken, again)],
            "norms": [result.grad_norm for result in (first, empty, broken, again)],
            "updates": trainer.updates,
            "shape": tuple(norm.shape),
        }
    return found


@pytest.mark.timeout(240)
def test_they_are_skipped_on_all_ranks_and_training_goes_on(tmp_path: Any) -> None:
    ranks = on_two_ranks(tmp_path, steps)
    for case in CASES:
        for found in (one[case] for one in ranks):
            assert found["applied"] == [True, False, False, True], case
            assert found["no_targets"] == [False, True, False, False], case
            assert found["unchanged"] == (True, True), case
            assert found["updates"] == 2
            assert found["norms"][1] == 0.0 and not math.isfinite(found["norms"][2])
            first, empty, broken, again = found["losses"]
            assert math.isnan(empty) and math.isnan(broken) and again < first
