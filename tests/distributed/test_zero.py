"""ZeRO-1: states on their owners, gradients reduced to them, weights gathered from them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import joined_processes
from tests.training.tiny import alone, losses, tiny_config

STEPS = 5
FP64 = "precision.compute=fp64"
ZERO = "parallel.zero=1"
WHOLE = "parallel.zero_partition=whole_tensor"
EXACT = ["precision.level=O2", "precision.gradient.fp8.reduce=exact", "run.threads=1"]
CASES: dict[str, tuple[list[str], float]] = {
    "fp64-rows": ([FP64], 1e-9),
    "fp64-whole": ([FP64, WHOLE], 1e-9),
    "fp64-gpt-tied": ([FP64, "model.family=gpt"], 1e-9),
    "fp64-fp8": ([FP64, "precision.gemm.fp8=true"], 1e-9),
    "bf16": ([], 1e-3),
    "O1": (["precision.level=O1"], 5e-3),
    "O3-rows": (["precision.level=O3"], 5e-3),
    "O3-whole": (["precision.level=O3", WHOLE], 5e-3),
    "O3-small-messages": (["precision.level=O3", "precision.gradient.bucket_mib=0.003"], 5e-3),
    "O2-compute-traffic": (["precision.level=O2"], 5e-3),
    "O2-bf16-reduce": (["precision.level=O2", "precision.gradient.fp8.reduce=bf16"], 5e-3),
    "O2-paper": (["precision.level=O2", "precision.profile=paper"], 2e-2),
    "O2-lion": (["precision.level=O2", "optimizer.name=lion", "optimizer.lr=0.002"], 1e-2),
    "O2-exact": (EXACT, 0.0),
    "O2-exact-whole": ([*EXACT, WHOLE], 0.0),
}
# The same operands on the wire as codes or as BF16, and any message size: the same bits.
EQUAL = [("O3-rows", "O3-small-messages"), ("O3-rows", "O2-compute-traffic"), ("O3-rows", "O3-whole")]


def zero_losses(
    group: dist.ProcessGroup, rank: int, world_size: int, names: list[str], more: list[str]
) -> dict[str, list[float]]:
    """Runs in the pool: the losses of each case."""
    processes = joined_processes(torch.device("cpu"))
    return {name: losses(tiny_config([*CASES[name][0], ZERO, *more]), processes, STEPS)[0] for name in names}


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_owners_train_as_one_process(gloo_pool, world_size: int) -> None:
    batch = [] if world_size == 2 else ["train.global_batch_size=9"]
    per_rank = gloo_pool.run(zero_losses, world_size, list(CASES), batch, timeout=600.0)
    for name, (overrides, tolerance) in CASES.items():
        expected = torch.tensor(losses(tiny_config([*overrides, *batch]), alone(), STEPS)[0]).double()
        got = torch.tensor(per_rank[0][name]).double()
        assert all(result[name] == per_rank[0][name] for result in per_rank), f"{name}: ranks disagree"
        worst = float(((got - expected).abs() / expected.abs()).max())
        assert worst <= tolerance, f"{name}: {worst:.1e}"
    for one, other in EQUAL:
        assert per_rank[0][one] == per_rank[0][other], f"{one} and {other}"
