"""Tensor and sequence parallelism: any cut of the matrices trains as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import Layout, joined_processes
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
from tests.distributed.pool import GlooPool
from tests.training.tiny import VOCAB, alone, batches, losses, of_one_process, tiny_config

STEPS = 5
# Rows of the matrices that are cut along them are 256 long: blocks of 128 survive a cut in two.
WIDE: dict[str, Any] = {
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 32,
        "ffn_hidden_size": 256,
        "vocab_size": VOCAB,
    }
}
FP64 = "precision.compute=fp64"
FP8 = "precision.gemm.fp8=true"
PLAIN_WIRE = [
    f"precision.traffic.{name}=compute" for name in ("activations", "grad_output", "grad_input", "weights")
]
EXACT = ["precision.gradient.fp8.reduce=exact", "run.threads=1"]
FP8_WIRE = ["precision.traffic.activations=fp8", "precision.traffic.grad_output=fp8"]
CASES: dict[str, tuple[list[str], float]] = {
    "fp64": ([FP64], 1e-9),
    "fp64-gpt-tied": ([FP64, "model.family=gpt"], 1e-9),
    "fp64-fp8": ([FP64, FP8], 1e-9),
    # The operands' own codes travel: the same GEMMs as without.
    "fp64-fp8-wire": ([FP64, FP8, *FP8_WIRE], 1e-9),
    "fp64-fp8-head": ([FP64, FP8, "precision.gemm.head=fp8", "model.family=gpt"], 1e-9),
    "fp64-recompute": ([FP64, FP8, *FP8_WIRE, "train.activation_checkpointing=full"], 1e-9),
    "fp64-batch-2": ([FP64, FP8, *FP8_WIRE, "train.micro_batch_size=2"], 1e-9),
    "fp32": (["precision.compute=fp32"], 1e-5),
    # BF16 partial sums of two ranks are rounded twice, one process rounds once.
    "bf16": ([], 2e-3),
    # Scales are of whole tensors, so every code is that of one process.
    "fp64-O2-exact": ([FP64, "precision.level=O2", *EXACT], 1e-9),
    "fp64-O1-paper": ([FP64, "precision.level=O1", "precision.profile=paper"], 1e-9),
    "O2": (["precision.level=O2"], 5e-3),
    "O2-lossy-wire": (
        ["precision.level=O2", *FP8_WIRE, "precision.traffic.grad_input=fp8", "precision.traffic.output=fp8"],
        1e-2,
    ),
}


# Blocks of 128 survive a cut in four.
WIDER = ["model.head_dim=64", "model.ffn_hidden_size=512"]


def layout_losses(
    group: dist.ProcessGroup, rank: int, world_size: int, names: list[str], layout: Layout, more: list[str]
) -> dict[str, list[float]]:
    """Runs in the pool: the losses of each case."""
    processes = joined_processes(torch.device("cpu"), layout)
    overrides = [f"parallel.tp={layout.tp}", f"parallel.pp={layout.pp}", f"parallel.cp={layout.cp}"]
    cases = {name: CASES[name][0] if layout.tp > 1 else of_one_process(CASES[name][0]) for name in names}
    return {
        name: losses(tiny_config([*case, *overrides, *more], **WIDE), processes, STEPS)[0]
        for name, case in cases.items()
    }


def check(
    pool: GlooPool, ranks: int, names: list[str], layout: Layout, more: list[str] | None = None
) -> None:
    """Every case on ``ranks`` ranks and on one process."""
    more = more or []
    per_rank = pool.run(layout_losses, ranks, names, layout, more, timeout=600.0)
    for name in names:
        overrides, tolerance = CASES[name]
        config = tiny_config(of_one_process([*overrides, *more]), **WIDE)
        expected = torch.tensor(losses(config, alone(), STEPS)[0]).double()
        got = torch.tensor(per_rank[0][name]).double()
        assert all(result[name] == per_rank[0][name] for result in per_rank), f"{name}: ranks disagree"
        worst = float(((got - expected).abs() / expected.abs()).max())
        assert worst <= tolerance, f"{name}: {worst:.1e}"


# In every run; the others when asked for slow tests.
QUICK = [
    *("fp64-gpt-tied", "fp64-fp8-wire", "fp64-fp8-head", "fp64-batch-2", "bf16", "O2-lossy-wire"),
    *("fp64-O2-exact", "fp64-O1-paper"),
]


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param([name for name in CASES if name not in QUICK], marks=pytest.mark.slow)],
    ids=["quick", "rest"],
)
def test_two_ranks_train_as_one(gloo_pool, names: list[str]) -> None:
    check(gloo_pool, 2, names, Layout(tp=2))


def test_parts_of_sequences_train_as_one(gloo_pool) -> None:
    names = ["fp64-gpt-tied", "fp64-fp8"]
    check(gloo_pool, 2, names, Layout(cp=2))


@pytest.mark.slow
def test_four_ranks_and_mixed_layouts(gloo_pool) -> None:
    names = ["fp64", "fp64-gpt-tied", "fp64-fp8-wire", "fp64-recompute", "fp64-batch-2"]
    check(gloo_pool, 4, names, Layout(tp=4), WIDER)
    check(gloo_pool, 4, names, Layout(tp=2))
    check(gloo_pool, 8, names, Layout(tp=2, cp=2))
    check(gloo_pool, 2, names, Layout(cp=2))


def operand_bytes(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, dict[str, int]]:
    """Runs in the pool: bytes of a step over the tensor-parallel group, by purpose, for three kinds of
    traffic."""
    processes = joined_processes(torch.device("cpu"), Layout(tp=2))
    result = {}
    for name, wire in (
        ("compute", PLAIN_WIRE),
        ("gathers", [*PLAIN_WIRE, *FP8_WIRE]),
        ("both", [*PLAIN_WIRE, *FP8_WIRE, "precision.traffic.grad_input=fp8"]),
    ):
        config = tiny_config(["precision.level=O2", "parallel.tp=2", *wire], **WIDE)
        trainer = Trainer(config, processes, vocab_size=VOCAB)
        before = dict(processes.tp.sent)
        trainer.step(0, batches(config, processes).batch(0))
        result[name] = {key: count - before.get(key, 0) for key, count in processes.tp.sent.items()}
    return result


def test_wire_bytes_of_a_column_parallel_edge(gloo_pool) -> None:
    """Input gathered twice, its gradient scattered once: 2 + 2 + 2 bytes an element in BF16."""
    sent = gloo_pool.run(operand_bytes, 2, timeout=300.0)[0]

    def edge(name: str) -> int:
        return sum(count for key, count in sent[name].items() if key.endswith(("tp_input", "tp_grad_input")))

    def all_traffic(name: str) -> int:
        ends = ("tp_embedding", "tp_head")  # never in FP8, and as much as a layer of a model of two
        return sum(count for key, count in sent[name].items() if "tp_" in key and not key.endswith(ends))

    assert edge("gathers") / edge("compute") == pytest.approx(4 / 6, rel=0.01)
    # Codes and a byte per block of 32: rows are as narrow as the tiny model.
    assert edge("both") / edge("compute") == pytest.approx((3 + 1 / 32) / 6, rel=0.01)
    # Two column-parallel edges of 6 bytes, two row-parallel ones of 4 (an output scattered, its gradient
    # gathered).
    assert all_traffic("gathers") / all_traffic("compute") == pytest.approx(14 / 20, rel=0.01)
    assert all_traffic("both") / all_traffic("compute") == pytest.approx((12 + 2 / 32) / 20, rel=0.01)


def losses_by_wire(group: dist.ProcessGroup, rank: int, world_size: int) -> list[list[float]]:
    """Runs in the pool: losses with gathers in BF16 and in FP8."""
    processes = joined_processes(torch.device("cpu"), Layout(tp=2))
    level = ["precision.level=O2", "parallel.tp=2"]
    return [
        losses(tiny_config([*level, *wire], **WIDE), processes, STEPS)[0]
        for wire in (PLAIN_WIRE, [*PLAIN_WIRE, *FP8_WIRE])
    ]


def test_gathers_in_fp8_change_no_bit(gloo_pool) -> None:
    """They carry the operands of the GEMMs, which ranks that gather BF16 cast to afterwards."""
    for plain, fp8 in gloo_pool.run(losses_by_wire, 2, timeout=300.0):
        assert plain == fp8


def save_in_parts(group: dist.ProcessGroup, rank: int, world_size: int, root: Path) -> float:
    """Runs in the pool: three steps of a run that is cut in two, its checkpoint, and the next loss."""
    processes = joined_processes(torch.device("cpu"), Layout(tp=2))
    config = tiny_config([*CASES["O2"][0], "parallel.tp=2"], **WIDE)
    trainer = Trainer(config, processes, vocab_size=VOCAB)
    data = batches(config, processes)
    for step in range(3):
        trainer.step(step, data.batch(step))
    save_checkpoint(
        root, 3, trainer.checkpoint_tensors(), meta={}, rank_state={}, group=processes.control, keep_last=1
    )
    return float(trainer.step(3, data.batch(3)).loss)


def test_a_checkpoint_of_parts_is_one_of_the_whole(gloo_pool, tmp_path: Path) -> None:
    next_loss = gloo_pool.run(save_in_parts, 2, tmp_path, timeout=300.0)[0]
    config = tiny_config(CASES["O2"][0], **WIDE)
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    load_checkpoint(tmp_path / "step_00000003", trainer.checkpoint_tensors(), group=None)
    trainer.restored(trainer.state_meta() | {"updates": 3})
    loss = float(trainer.step(3, batches(config, alone()).batch(3)).loss)
    assert loss == pytest.approx(next_loss, rel=CASES["O2"][1])
