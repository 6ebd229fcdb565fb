"""ZeRO-1: states on their owners, gradients reduced to them, weights gathered from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import joined_processes
from fp8train.live.describe import stored_bytes
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
from tests.training.tiny import VOCAB, alone, batches, losses, of_one_process, tiny_config

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
    "O3-coat": (["precision.level=O3", "precision.state.plan=coat"], 5e-3),
    "O3-e4m3-e5m2": (["precision.level=O3", "precision.state.plan=e4m3_e5m2"], 5e-3),
    "fp64-fp8-head-whole": ([FP64, "precision.gemm.fp8=true", "precision.gemm.head=fp8", WHOLE], 1e-9),
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


# In every run; the others when asked for slow tests.
QUICK = [
    "fp64-rows",
    "fp64-gpt-tied",
    "O3-rows",
    "O3-whole",
    "O2-compute-traffic",
    "O2-paper",
    "O3-coat",
    "O3-e4m3-e5m2",
    "O2-exact-whole",
]


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, QUICK),
        pytest.param(2, [name for name in CASES if name not in QUICK], marks=pytest.mark.slow),
        pytest.param(3, list(CASES), marks=pytest.mark.slow),
    ],
    ids=["2", "2-rest", "3"],
)
def test_owners_train_as_one_process(gloo_pool, world_size: int, names: list[str]) -> None:
    batch = [] if world_size == 2 else ["train.global_batch_size=9"]
    per_rank = gloo_pool.run(zero_losses, world_size, names, batch, timeout=600.0)
    for name in names:
        overrides, tolerance = CASES[name]
        expected = torch.tensor(
            losses(tiny_config(of_one_process([*overrides, *batch])), alone(), STEPS)[0]
        ).double()
        got = torch.tensor(per_rank[0][name]).double()
        assert all(result[name] == per_rank[0][name] for result in per_rank), f"{name}: ranks disagree"
        worst = float(((got - expected).abs() / expected.abs()).max())
        assert worst <= tolerance, f"{name}: {worst:.1e}"
    for one, other in EQUAL:
        if not {one, other} <= set(names):
            continue
        assert per_rank[0][one] == per_rank[0][other], f"{one} and {other}"


def persistent(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, float]:
    """Runs in the pool: bytes per parameter of the FP8 plan on this rank, weights included."""
    sizes = {
        "model": {
            "family": "llama",
            "num_layers": 1,
            "hidden_size": 128,
            "num_heads": 4,
            "num_kv_heads": 4,
            "ffn_hidden_size": 256,
            "vocab_size": VOCAB,
        }
    }
    # One micro-batch a rank: gradients are cast as they are produced.
    config = tiny_config(["precision.level=O3", "train.global_batch_size=4"], **sizes)
    processes = joined_processes(torch.device("cpu"))
    trainer = Trainer(config, processes, vocab_size=VOCAB)
    trainer.step(0, batches(config, processes).batch(0))
    return stored_bytes(trainer).per_parameter()


def test_persistent_bytes_at_o3(gloo_pool) -> None:
    """Weight 1, gradient 1, and 5 of states over the ranks: FP16 master and v, FP8 m."""
    for shares in gloo_pool.run(persistent, 4, timeout=300.0):
        assert shares["accumulator"] == 0.0
        assert shares["total"] + shares["compute_copy"] == pytest.approx(1 + 1 + 5 / 4, rel=0.03)


def resharded(
    group: dist.ProcessGroup, rank: int, world_size: int, root: Path
) -> tuple[list[float], list[float]]:
    """Runs in the pool: a checkpoint of one partition read into the other; the next losses of both."""
    processes = joined_processes(torch.device("cpu"))
    found = []
    for number, overrides in enumerate(([], [WHOLE])):
        config = tiny_config(["precision.level=O3", *overrides])
        data = batches(config, processes)
        trainer = Trainer(config, processes, vocab_size=VOCAB)
        if number:
            load_checkpoint(root / "step_00000003", trainer.checkpoint_tensors(), group=processes.control)
            trainer.restored(trainer.state_meta() | {"updates": 3})
        else:
            for step in range(3):
                trainer.step(step, data.batch(step))
            save_checkpoint(
                root,
                3,
                trainer.checkpoint_tensors(),
                meta={},
                rank_state={},
                group=processes.control,
                keep_last=1,
            )
        found.append([float(trainer.step(step, data.batch(step)).loss) for step in (3, 4)])
    return found[0], found[1]


def test_a_checkpoint_fits_the_other_partition(gloo_pool, tmp_path: Path) -> None:
    for rows, whole in gloo_pool.run(resharded, 2, tmp_path, timeout=300.0):
        assert rows == whole
