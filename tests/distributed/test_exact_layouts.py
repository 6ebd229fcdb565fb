"""``exact`` reduction: the same bits under data parallelism, ZeRO and pipelines as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint import load_checkpoint, save_checkpoint
from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.schema import Config
from fp8train.training.trainer import Trainer
from tests.distributed.test_levels import digest
from tests.training.tiny import VOCAB, alone, batches, losses, tiny_config

STEPS = 6
CLIP = 0.2
EXACT = [
    "precision.gradient.fp8.reduce=exact",
    f"optimizer.clip_grad_norm={CLIP}",
    "run.threads=1",
    "model.num_layers=4",
    "model.tie_embeddings=false",
]
ROWS, WHOLE = ["parallel.zero=1"], ["parallel.zero=1", "parallel.zero_partition=whole_tensor"]
INTERLEAVED = ["parallel.pipeline.schedule=interleaved_1f1b"]
ZBV = ["parallel.pipeline.schedule=zbv"]
# (ranks, pipeline ranks, overrides): data parallelism takes the rest.
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "dp2-whole": (2, 1, WHOLE),
    "dp4-rows": (4, 1, ROWS),
    "pp2": (2, 2, []),
    "pp2-dp2": (4, 2, INTERLEAVED),
    "pp2-dp2-rows": (4, 2, [*ROWS, *ZBV]),
    "pp2-dp4-whole": (8, 2, WHOLE),
    "pp4-dp2-rows": (8, 4, ROWS),
}


def exact_config(level: str, layout: list[str]) -> Config:
    return tiny_config([f"precision.level={level}", *EXACT, *layout])


def train(
    group: dist.ProcessGroup, rank: int, world_size: int, level: str, name: str, folder: Path
) -> list[float]:
    """Runs in the pool: losses; the final state is left in ``folder``."""
    _, pp, overrides = LAYOUTS[name]
    processes = joined_processes(torch.device("cpu"), Layout(pp, 1, 1))
    found, trainer = losses(exact_config(level, [f"parallel.pp={pp}", *overrides]), processes, STEPS)
    tensors, control = trainer.checkpoint_tensors(), processes.control
    save_checkpoint(folder, STEPS, tensors, meta={}, rank_state={}, group=control, keep_last=1)
    return found


def loaded_alone(level: str, folder: Path) -> str:
    """Digest of a checkpoint, read by one process."""
    trainer = Trainer(exact_config(level, ["parallel.zero=none"]), alone(), vocab_size=VOCAB)
    load_checkpoint(folder / f"step_{STEPS:08d}", trainer.checkpoint_tensors(), group=None)
    return digest(trainer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("level", "names"),
    [
        ("O2", ["dp2-whole", "pp2-dp2-rows"]),
        pytest.param("O2", list(LAYOUTS), marks=pytest.mark.slow),
        pytest.param(
            "O3", [n for n, (_, _, o) in LAYOUTS.items() if "zero" in str(o)], marks=pytest.mark.slow
        ),
    ],
    ids=["O2", "O2-all", "O3-all"],
)
def test_the_same_bits_on_every_layout(gloo_pool, tmp_path: Path, level: str, names: list[str]) -> None:
    trainer = Trainer(exact_config(level, ["parallel.zero=none"]), alone(), vocab_size=VOCAB)
    data, expected, norms = batches(trainer.config, alone()), [], []
    for step in range(STEPS):
        result = trainer.step(step, data.batch(step))
        expected.append(float(result.loss))
        norms.append(float(result.grad_norm))
    assert max(norms) > CLIP, "clipping was not active"
    for name in names:
        folder = tmp_path / name
        per_rank = gloo_pool.run(train, LAYOUTS[name][0], level, name, folder, timeout=300.0)
        assert per_rank == [expected] * len(per_rank), f"{name}: losses differ"
        assert loaded_alone(level, folder) == digest(trainer), f"{name}: the state differs"
