"""Replicas that drift apart are found, and named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import joined_processes
from fp8train.step.consistency import InconsistentError, check_replicas, fingerprint
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_every_flipped_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    before = int(fingerprint(x))
    assert int(fingerprint(x.clone())) == before
    raw = x.view(torch.uint8)
    for position in (0, 1, 17, len(raw) - 1):
        for bit in range(8):
            raw[position] ^= 1 << bit
            assert int(fingerprint(x)) != before
            raw[position] ^= 1 << bit


def test_swapped_elements_change_the_fingerprint() -> None:
    x = torch.arange(100, dtype=torch.int32)
    swapped = x.clone()
    swapped[[3, 70]] = x[[70, 3]]
    assert int(fingerprint(x)) != int(fingerprint(swapped))


def damaged(group: dist.ProcessGroup, rank: int, world_size: int, level: str) -> list[str]:
    """Runs in the pool: messages of three checks, of which the last two find damage on rank 1."""
    processes = joined_processes(torch.device("cpu"))
    settings = [] if level == "O0" else [f"precision.level={level}", "precision.profile=paper"]
    config = tiny_config(["train.global_batch_size=9", *settings])
    trainer = Trainer(config, processes, vocab_size=VOCAB)
    found = []
    linear = trainer.model.linears()["layers.1.mlp.down"]

    def check() -> None:
        try:
            check_replicas(trainer)
        except InconsistentError as error:
            found.append(str(error))
        else:
            found.append("")

    check()
    weight = linear.fp8_codes() if linear.fp8_weight_is_resident else linear.weight.detach()
    bits = weight.view(torch.uint8).view(-1)
    bits[5] ^= 1 if rank == 1 else 0
    check()
    bits[5] ^= 1 if rank == 1 else 0
    if trainer.scales is not None and rank == 1:
        trainer.scales.scales[0] += 1
    check()
    return found


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_one_flipped_bit_is_named_on_every_rank(gloo_pool, level: str) -> None:
    for clean, flipped, scale in gloo_pool.run(damaged, 3, level, timeout=180.0):
        assert clean == ""
        assert "data-parallel rank 1: layers.1.mlp.down.weight" in flipped
        assert "rank 0" not in flipped
        assert ("data-parallel rank 1: scale state" in scale) == (level == "O2")


def one_of_two(group: dist.ProcessGroup, rank: int, world_size: int, damaged_rank: int) -> str:
    """Runs in the pool: the message where one of two replicas is damaged."""
    trainer = Trainer(tiny_config(), joined_processes(torch.device("cpu")), vocab_size=VOCAB)
    check_replicas(trainer)
    if rank == damaged_rank:
        trainer.model.linears()["layers.1.mlp.down"].weight.detach().view(torch.uint8).view(-1)[5] ^= 1
    with pytest.raises(InconsistentError) as caught:
        check_replicas(trainer)
    return str(caught.value)


@pytest.mark.parametrize("damaged_rank", [0, 1])
def test_two_replicas_accuse_nobody(gloo_pool, damaged_rank: int) -> None:
    messages = gloo_pool.run(one_of_two, 2, damaged_rank)
    assert messages[0] == messages[1]
    assert "layers.1.mlp.down.weight; no majority of the 2 ranks agrees" in messages[0]
    assert "rank 0:" not in messages[0] and "rank 1:" not in messages[0]
