"""Data parallelism: any number of ranks trains as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import joined_processes
from tests.training.tiny import alone, losses, tiny_config

STEPS = 20

FP8 = "precision.gemm.fp8=true"
CASES = {
    "fp64": (["precision.compute=fp64"], 1e-9),
    "fp64-fp8": (["precision.compute=fp64", FP8], 1e-9),
    "fp64-gpt-tied": (["precision.compute=fp64", "model.family=gpt"], 1e-9),
    "fp32": (["precision.compute=fp32"], 1e-5),
    "fp32-small-buckets": (["precision.compute=fp32", "precision.gradient.bucket_mib=0.005"], 1e-5),
    # FP8 codes flip where an FP32 sum moved by an ulp; one flipped code is 2^-4 of one operand element.
    "fp32-fp8": (["precision.compute=fp32", FP8], 1e-3),
    "bf16": ([], 1e-3),
}


def train_case(group: dist.ProcessGroup, rank: int, world_size: int, overrides: list[str]) -> list[float]:
    """Runs in the pool: the losses of one rank."""
    return losses(tiny_config(overrides), joined_processes(torch.device("cpu")), STEPS)[0]


def train_all(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, list[float]]:
    """Runs in the pool: every case, to start the ranks once."""
    return {name: train_case(group, rank, world_size, overrides) for name, (overrides, _) in CASES.items()}


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    """Losses of one process."""
    return {name: losses(tiny_config(overrides), alone(), STEPS)[0] for name, (overrides, _) in CASES.items()}


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_train_as_one_process(gloo_pool, reference: dict[str, list[float]], world_size: int) -> None:
    per_rank = gloo_pool.run(train_all, world_size)
    for name, (_, tolerance) in CASES.items():
        assert all(result[name] == per_rank[0][name] for result in per_rank), f"{name}: ranks disagree"
        got, expected = torch.tensor(per_rank[0][name]).double(), torch.tensor(reference[name]).double()
        worst = float(((got - expected).abs() / expected.abs()).max())
        assert worst <= tolerance, f"{name} at {world_size} ranks: {worst:.1e}"
        assert expected[-1] < 0.8 * expected[0], f"{name}: did not learn"


def weights_digest(group: dist.ProcessGroup, rank: int, world_size: int, overrides: list[str]) -> bytes:
    """Runs in the pool: the bits of all master weights after a few steps."""
    trainer = losses(tiny_config(overrides), joined_processes(torch.device("cpu")), 5)[1]
    return b"".join(t.numpy().tobytes() for t in trainer.state_tensors().values())


@pytest.mark.parametrize("overrides", [[], [FP8]], ids=["bf16", "fp8"])
def test_two_runs_are_bit_identical_and_ranks_hold_equal_weights(gloo_pool, overrides: list[str]) -> None:
    first = gloo_pool.run(weights_digest, 2, overrides)
    second = gloo_pool.run(weights_digest, 2, overrides)
    assert first[0] == first[1] == second[0] == second[1]


def accumulation(group: dist.ProcessGroup, rank: int, world_size: int) -> list[float]:
    """Runs in the pool: two ranks with four micro-batches each, masked documents."""
    config = tiny_config(["precision.compute=fp64", "train.micro_batch_size=2"])
    return losses(config, joined_processes(torch.device("cpu")), 6)[0]


def test_micro_batch_size_does_not_change_the_mean(gloo_pool) -> None:
    got = gloo_pool.run(accumulation, 2)[0]
    expected = losses(tiny_config(["precision.compute=fp64", "train.micro_batch_size=8"]), alone(), 6)[0]
    assert got == pytest.approx(expected, rel=1e-9)


def bytes_sent(group: dist.ProcessGroup, rank: int, world_size: int) -> tuple[int, int]:
    """Runs in the pool: counted gradient bytes of three steps, and parameters."""
    processes = joined_processes(torch.device("cpu"))
    trainer = losses(tiny_config(["precision.gradient.reduce=bf16"]), processes, 3)[1]
    return processes.dp.sent["all_reduce/gradient"], sum(p.numel() for p in trainer.model.parameters())


def test_gradient_bytes_are_counted(gloo_pool) -> None:
    sent, parameters = gloo_pool.run(bytes_sent, 4)[0]
    assert sent == 3 * 2 * (2 * parameters) * 3 // 4  # steps x ring all-reduce of BF16 over 4 ranks
