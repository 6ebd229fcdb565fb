"""States in host memory on several ranks: the bits of states on the device, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, joined_processes
from fp8train.optim.host_states import Offload
from fp8train.step.consistency import check_replicas
from fp8train.step.trainer import Trainer
from tests.distributed.test_gradient_release import WIDER
from tests.optim.late_queues import LateQueues
from tests.step.test_gradient_release import bits, train
from tests.training.tiny import VOCAB, tiny_config

ROWS, WHOLE = (["parallel.zero=1", f"parallel.zero_partition={kind}"] for kind in ("rows", "whole_tensor"))
RELEASED = ("optimizer.clip_grad_norm=0", "train.gradient_release=true", "precision.gradient.bucket_mib=0.01")
PAPER = ("precision.level=O2", "precision.profile=paper")
PARTS, STAGES = Layout(tp=2), Layout(pp=2)
CASES: dict[str, tuple[Layout, list[str]]] = {
    "O3, rows": (Layout(), ["precision.level=O3", *ROWS]),
    "O3, whole tensors": (Layout(), ["precision.level=O3", *WHOLE]),
    "O0, rows, tied": (Layout(), ["precision.level=O0", "model.tie_embeddings=true", *ROWS]),
    "O2, paper, rows": (Layout(), [*PAPER, *ROWS]),
    "O3, rows, released": (Layout(), ["precision.level=O3", "train.micro_batch_size=4", *RELEASED, *ROWS]),
    "O2, TP": (PARTS, ["precision.level=O2"]),
    "O2, paper, TP": (PARTS, [*PAPER]),
    "O3, PP": (STAGES, ["precision.level=O3"]),
    "O2, coat, tied, PP": (
        STAGES,
        ["precision.level=O2", "precision.state.plan=coat", "model.tie_embeddings=true"],
    ),
    "O3, rows, TP": (PARTS, ["precision.level=O3", *ROWS]),
    "O2, paper, whole tensors, PP": (STAGES, [*PAPER, *WHOLE]),
}
OF_FOUR = ("O3, rows, TP", "O2, paper, whole tensors, PP")
QUICK = ("O3, rows", "O2, paper, rows", "O2, TP", "O3, PP")
SLOW = [name for name in CASES if name not in (*QUICK, *OF_FOUR)]


def trainer_of(name: str, *, offload: Offload | None) -> Trainer:
    layout, overrides = CASES[name]
    sizes = {axis: getattr(layout, axis) for axis in ("tp", "pp")}
    config = tiny_config(
        [
            *(*WIDER, *overrides, *(f"parallel.{axis}={size}" for axis, size in sizes.items())),
            f"optimizer.offload={'none' if offload is None else 'cpu'}",
        ]
    )
    return Trainer(config, joined_processes(torch.device("cpu"), layout), vocab_size=VOCAB, offload=offload)


def differences(group: dist.ProcessGroup, rank: int, world_size: int, names: list[str]) -> dict[str, Any]:
    """Runs in the pool: of each case, whether results are those of states on the device after two steps,
    which tensors are not, and how many loads there are."""
    result = {}
    for name in names:
        shards = world_size // CASES[name][0].model_ranks if "parallel.zero=1" in CASES[name][1] else 1
        plain = trainer_of(name, offload=None)
        offloaded = trainer_of(name, offload=Offload(LateQueues(check=False), 16384, shards))
        same = train(offloaded, 0, 2) == train(plain, 0, 2)
        check_replicas(offloaded)
        one, two = bits(plain), bits(offloaded)
        host = offloaded.optimizer.states._host
        assert host is not None
        result[name] = same, [key for key in one if one[key] != two[key]], len(host._loads)
    return result


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (2, [*QUICK]),
        pytest.param(2, SLOW, marks=pytest.mark.slow),
        pytest.param(4, [*OF_FOUR], marks=pytest.mark.slow),
    ],
    ids=["quick", "slow", "four"],
)
def test_ranks_have_the_bits_of_ranks_without(gloo_pool, world_size: int, names: list[str]) -> None:
    for result in gloo_pool.run(differences, world_size, names, timeout=170.0):
        for name, (same, differ, loads) in result.items():
            assert (same, differ) == (True, []), name
            assert loads > 3, name


def on_their_own(group: dist.ProcessGroup, rank: int, world_size: int) -> int:
    """Runs in the pool: bytes of states in host memory of this rank, where nobody says how they are kept."""
    trainer = trainer_of("O3, rows", offload=None)
    overrides = [*WIDER, *CASES["O3, rows"][1], "optimizer.offload=cpu"]
    offloaded = Trainer(tiny_config(overrides), trainer.processes, vocab_size=VOCAB)
    assert train(offloaded, 0, 2) == train(trainer, 0, 2) and bits(offloaded) == bits(trainer)
    return sum(offloaded.optimizer.states.stored_bytes(in_plan_only=False).values())


def test_owners_keep_their_own_rows_in_host_memory(gloo_pool) -> None:
    one, other = gloo_pool.run(on_their_own, 2)
    assert one == pytest.approx(other, rel=0.02)
