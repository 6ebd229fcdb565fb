"""Every level and every reduction on one process and on several: the same training, the same bits where
promised."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import Processes, joined_processes
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
from tests.training.tiny import VOCAB, alone, batches, losses, tiny_config

STEPS = 10
CASES: dict[str, list[str]] = {
    "O0": ["precision.level=O0"],
    "O1": ["precision.level=O1"],
    "O2": ["precision.level=O2"],
    "O2-gpt": ["precision.level=O2", "model.family=gpt"],
    "O2-paper": ["precision.level=O2", "precision.profile=paper"],
    "O1-paper-tree-fp8-accumulation": [
        *("precision.level=O1", "precision.profile=paper", "precision.gradient.fp8.sum=tree"),
        "precision.gradient.fp8.accumulate=fp8",
    ],
    "O2-exact": ["precision.level=O2", "precision.gradient.fp8.reduce=exact", "run.threads=1"],
    "O2-bf16": ["precision.level=O2", "precision.gradient.fp8.reduce=bf16"],
    "O2-feedback": ["precision.level=O2", "precision.gradient.fp8.error_feedback=true"],
    "O2-small-buckets": ["precision.level=O2", "precision.gradient.bucket_mib=0.003"],
    "O2-two-nodes": ["precision.level=O2", "precision.gradient.fp8.node_size=2"],
    "O2-two-nodes-bf16": [
        *("precision.level=O2", "precision.gradient.fp8.node_size=2"),
        "precision.gradient.fp8.between_nodes=bf16",
    ],
    "O2-two-nodes-zero": [
        *("precision.level=O2", "precision.gradient.fp8.node_size=2", "parallel.zero=1"),
    ],
    "O2-two-nodes-bf16-zero": [
        *("precision.level=O2", "precision.gradient.fp8.node_size=2", "parallel.zero=1"),
        *("precision.gradient.fp8.between_nodes=bf16", "parallel.zero_partition=whole_tensor"),
    ],
    "O2-shared-whole-zero": [  # most buckets are cheaper for everyone, some are scattered
        *("precision.level=O2", "precision.gradient.fp8.reduce=shared_scale", "parallel.zero=1"),
        *("parallel.zero_partition=whole_tensor", "precision.gradient.bucket_mib=0.003"),
    ],
    "O2-lion": ["precision.level=O2", "optimizer.name=lion", "optimizer.lr=0.002"],
    "O2-fp32-weights": ["precision.level=O2", "precision.weights=compute", "precision.compute=fp32"],
}
IN_CI = [
    *("O0", "O1", "O2", "O2-paper", "O1-paper-tree-fp8-accumulation", "O2-exact"),
    *("O2-two-nodes-bf16-zero", "O2-shared-whole-zero", "O2-lion"),
]
"""In every run; the others when asked for slow tests."""


def digest(trainer: Trainer) -> str:
    """Hash of everything a checkpoint would hold but counters of events, which skipped steps are."""
    sha = hashlib.sha256()
    for name, tensor in trainer.state_tensors().items():
        if name.startswith("scale_state/events/"):
            continue
        sha.update(name.encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def run_cases(
    group: dist.ProcessGroup, rank: int, world_size: int, names: list[str]
) -> dict[str, tuple[list[float], str]]:
    """Runs in the pool: losses and final state of each case."""
    result = {}
    for name in names:
        processes = joined_processes(torch.device("cpu"))
        values, trainer = losses(tiny_config(CASES[name]), processes, STEPS)
        result[name] = values, digest(trainer)
    return result


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    """Losses of one process."""
    return {name: alone_losses(name) for name in IN_CI}


def alone_losses(name: str) -> list[float]:
    """Of one process."""
    overrides = [override for override in CASES[name] if "node" not in override]
    return losses(tiny_config(overrides), alone(), STEPS)[0]


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        pytest.param(4, IN_CI, id="4"),
        pytest.param(4, [name for name in CASES if name not in IN_CI], id="4-rest", marks=pytest.mark.slow),
        pytest.param(2, list(CASES), id="2", marks=pytest.mark.slow),
    ],
)
def test_every_level_trains_as_one_process_does(
    gloo_pool, reference: dict[str, list[float]], world_size: int, cases: list[str]
) -> None:
    names = [name for name in cases if "two-nodes" not in name or world_size == 4]
    ranks = gloo_pool.run(run_cases, world_size, names, timeout=170.0)
    for name in names:
        per_rank = [result[name] for result in ranks]
        if "zero" in name:  # each rank keeps states of its own
            per_rank = [(losses, "") for losses, _ in per_rank]
        assert all(one == per_rank[0] for one in per_rank), f"{name}: ranks disagree"
        got, expected = torch.tensor(per_rank[0][0]), torch.tensor(reference.get(name) or alone_losses(name))
        if name == "O2-exact":
            assert torch.allclose(got, expected, rtol=1e-6, atol=0)  # only the metric's own sum may differ
        # Another number of ranks casts other partial sums: a few tenths of a percent on the way down.
        worst = float(((got - expected).abs() / expected).max())
        assert worst < 0.02, f"{name} at {world_size} ranks: {worst:.4f}"
        assert expected[-1] < 0.93 * expected[0], f"{name}: did not learn"


def test_levels_stay_close_to_bf16(reference: dict[str, list[float]]) -> None:
    for name in ("O1", "O2", "O2-paper", "O2-exact"):
        gap = abs(reference[name][-1] - reference["O0"][-1])
        assert gap < 0.05, f"{name}: {gap:.4f}"


EXACT = [
    *("precision.level=O2", "precision.gradient.fp8.reduce=exact", "run.threads=1"),
    "optimizer.clip_grad_norm=0.2",
]


def train_exactly(
    processes: Processes, first: int, last: int, folder: Path, load: bool
) -> tuple[str, float, bool]:
    """Steps ``first`` to ``last``, from and to a checkpoint: (digest, last gradient norm, saturated)."""
    config = tiny_config(EXACT)
    trainer, data = Trainer(config, processes, vocab_size=VOCAB), batches(config, processes)
    if load:
        loaded = load_checkpoint(
            folder / f"step_{first:08d}", trainer.state_tensors(), group=processes.control
        )
        trainer.check_meta(loaded.meta)
        trainer.restored(loaded.meta)
    norm = 0.0
    for step in range(first, last):
        result = trainer.step(step, data.batch(step))
        assert result.applied
        norm = result.grad_norm
    save_checkpoint(
        folder,
        last,
        trainer.state_tensors(),
        meta=trainer.state_meta(),
        rank_state={},
        group=processes.control,
        keep_last=5,
    )
    saturated = trainer.precision_metrics()["fp8/gradient_saturated_elements"]
    return digest(trainer), norm, saturated > 0


def exact_in_pool(
    group: dist.ProcessGroup, rank: int, world_size: int, first: int, last: int, folder: Path, load: bool
) -> tuple[str, float, bool]:
    """Runs in the pool."""
    return train_exactly(joined_processes(torch.device("cpu")), first, last, folder, load)


@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_exact_reduction_gives_the_same_bits_on_any_number_of_ranks(
    gloo_pool, tmp_path: Path, steps: int
) -> None:
    """Eight micro-batches a step as 1 x 8, 2 x 4, 4 x 2 and 8 x 1, clipped; and 2 ranks continued by 4."""
    whole, norm, _ = train_exactly(alone(), 0, steps, tmp_path / "1", False)
    assert norm > 0.2, "clipping was not active"
    for world_size in (2, 4, 8):
        folder = tmp_path / str(world_size)
        results = gloo_pool.run(exact_in_pool, world_size, 0, steps, folder, False, timeout=170.0)
        assert {result[0] for result in results} == {whole}, f"{world_size} ranks"
    folder = tmp_path / "moved"
    gloo_pool.run(exact_in_pool, 2, 0, steps // 2, folder, False)
    results = gloo_pool.run(exact_in_pool, 4, steps // 2, steps, folder, True, timeout=170.0)
    assert {result[0] for result in results} == {whole}


@pytest.mark.parametrize("name", ["O1", "O2", "O2-paper", "O2-exact"])
def test_evaluation_moves_no_state(name: str) -> None:
    config = tiny_config(CASES[name])
    trainer, data = Trainer(config, alone(), vocab_size=VOCAB), batches(config, alone())
    trainer.step(0, data.batch(0))
    before = digest(trainer)
    tokens = data.batch(7)[0] % VOCAB
    with torch.no_grad():
        trainer.model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    assert digest(trainer) == before
