"""``exact`` reduction: the same bits under data parallelism, ZeRO and pipelines as in one process, and with
matrices cut in parts as on the ranks of one copy of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import Layout, joined_processes
from fp8train.config.schema import Config
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
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
# Rows of 256 have blocks of 128, which a cut in two leaves whole.
PARTS = [
    *("parallel.tp=2", "model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=32"),
    "model.ffn_hidden_size=256",
]
ROWS, WHOLE = ["parallel.zero=1"], ["parallel.zero=1", "parallel.zero_partition=whole_tensor"]
INTERLEAVED = ["parallel.pipeline.schedule=interleaved_1f1b"]
ZBV = ["parallel.pipeline.schedule=zbv"]
# (ranks, pipeline ranks, overrides): data parallelism takes the rest.
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "dp2-whole": (2, 1, WHOLE),
    "dp4-rows": (4, 1, ROWS),
    "dp4-whole": (4, 1, [*WHOLE, "precision.gradient.bucket_mib=0.02"]),
    "pp2": (2, 2, []),
    "pp2-dp2": (4, 2, INTERLEAVED),
    "pp2-dp2-rows": (4, 2, [*ROWS, *ZBV]),
    "pp2-dp4-whole": (8, 2, WHOLE),
    "pp4-dp2-rows": (8, 4, ROWS),
    "tp2": (2, 1, PARTS),
    "tp2-dp2": (4, 1, PARTS),
    "tp2-dp2-rows": (4, 1, [*PARTS, *ROWS]),
    "tp2-pp2-dp2-whole": (8, 2, [*PARTS, *WHOLE]),
}


def exact_config(level: str, layout: list[str]) -> Config:
    return tiny_config([f"precision.level={level}", *EXACT, *layout])


def train(
    group: dist.ProcessGroup, rank: int, world_size: int, level: str, name: str, folder: Path
) -> list[float]:
    """Runs in the pool: losses; the final state is left in ``folder``."""
    _, pp, overrides = LAYOUTS[name]
    processes = joined_processes(torch.device("cpu"), Layout(pp, 1, 2 if PARTS[0] in overrides else 1))
    found, trainer = losses(exact_config(level, [f"parallel.pp={pp}", *overrides]), processes, STEPS)
    tensors, control = trainer.checkpoint_tensors(), processes.control
    save_checkpoint(folder, STEPS, tensors, meta={}, rank_state={}, group=control, keep_last=1)
    return found


def loaded_alone(level: str, folder: Path, sizes: list[str] | None = None) -> str:
    """Digest of a checkpoint, read by one process."""
    config = exact_config(level, ["parallel.zero=none", *(sizes or [])])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    load_checkpoint(folder / f"step_{STEPS:08d}", trainer.checkpoint_tensors(), group=None)
    return digest(trainer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("level", "names"),
    [
        ("O2", ["dp4-whole", "pp2-dp2-rows"]),
        pytest.param("O2", [n for n in LAYOUTS if "tp" not in n], marks=pytest.mark.slow),
        pytest.param("O3", ["dp2-whole", "dp4-rows", "pp2-dp2-rows", "pp4-dp2-rows"], marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("level", "names"),
    [
        ("O2", ["tp2-dp2-rows"]),
        pytest.param("O2", ["tp2-dp2", "tp2-pp2-dp2-whole"], marks=pytest.mark.slow),
        pytest.param("O3", ["tp2-dp2-rows", "tp2-pp2-dp2-whole"], marks=pytest.mark.slow),
    ],
    ids=["O2", "O2-all", "O3-all"],
)
def test_with_matrices_in_parts_other_ranks_change_no_bit(
    gloo_pool, tmp_path: Path, level: str, names: list[str]
) -> None:
    """Partial sums of two tensor-parallel ranks round otherwise than one process: they are the reference."""
    found, states = {}, {}
    for name in ["tp2", *names]:
        folder = tmp_path / name
        per_rank = gloo_pool.run(train, LAYOUTS[name][0], level, name, folder, timeout=300.0)
        assert all(one == per_rank[0] for one in per_rank), f"{name}: ranks disagree"
        found[name], states[name] = per_rank[0], loaded_alone(level, folder, PARTS[1:])
    for name in names:
        assert found[name] == found["tp2"], f"{name}: losses differ"
        assert states[name] == states["tp2"], f"{name}: the state differs"
