"""Norms, attention, AdamW and gradient norms of other packages on two ranks, on the fakes: what the same
ranks compute with our own kernels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8train.comm.processes import Layout, Processes, joined_processes
from fp8train.step.trainer import Trainer
from tests.distributed.pool import GlooPool
from tests.fakes import apex_fake, te_layers_fake
from tests.fakes.transformer_engine_fake import install
from tests.training.tiny import VOCAB, batches, tiny_config

STEPS = 3
SHARED = ["model.num_heads=4", "model.head_dim=8", "train.global_batch_size=4", "optimizer.lr=0.003"]
PACKAGES = [f"kernels.{name}=apex" for name in ("norm", "optimizer", "multi_tensor")]
PACKAGES.append("kernels.attention=te")
LAYOUTS: dict[str, tuple[Layout, list[str]]] = {
    "tp": (Layout(tp=2), ["parallel.tp=2", "model.head_dim=64", "model.ffn_hidden_size=256"]),
    "pp, tied": (Layout(pp=2), ["parallel.pp=2", "model.family=gpt", "model.num_kv_heads=4"]),
    "cp": (Layout(cp=2), ["parallel.cp=2"]),
    "zero": (Layout(), ["parallel.zero=1"]),
    # Ranks own nothing of most parameters: kernels that take many tensors get no empty ones.
    "zero, whole tensors": (Layout(), ["parallel.zero=1", "parallel.zero_partition=whole_tensor"]),
    "zero, O2": (Layout(), ["parallel.zero=1", "precision.level=O2"]),
}


def anywhere(device: torch.device) -> None:
    """The fakes run on any device."""


def history(overrides: list[str], processes: Processes) -> tuple[list[tuple[float, float]], Trainer]:
    config = tiny_config([*SHARED, *overrides])
    trainer = Trainer(config, processes, vocab_size=VOCAB, runs_on=anywhere)
    data, found = batches(config, processes), []
    for i in range(STEPS):
        result = trainer.step(i, data.batch(i))
        found.append((float(result.loss), result.grad_norm))
    return found, trainer


def both(
    group: dist.ProcessGroup, rank: int, world_size: int, name: str
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[str]]:
    """Runs in the pool: (loss, gradient norm) of each step with packages and with ours, and the calls."""
    layout, overrides = LAYOUTS[name]
    processes = joined_processes(torch.device("cpu"), layout)
    ours, _ = history(overrides, processes)
    with pytest.MonkeyPatch.context() as patch:
        attention = install(patch, te_layers_fake.attention()).calls
        apex = apex_fake.install(patch).calls
        theirs, trainer = history([*overrides, *PACKAGES], processes)
        causal = [block.attention.causal for block in trainer.model.held_blocks()]
    assert all(one is not None for one in causal)
    return theirs, ours, [*attention, *apex]


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks(gloo_pool: GlooPool, name: str) -> None:
    for theirs, ours, calls in gloo_pool.run(both, 2, name, timeout=300.0):
        pairs = [pair for steps in zip(theirs, ours, strict=True) for pair in zip(*steps, strict=True)]
        apart = [abs(one / other - 1) for one, other in pairs]
        print(f"{name}: {max(apart[:2]):.2e} in the first step, {max(apart):.2e} in {STEPS}")
        assert max(apart[:2]) <= 2.0**-10 and max(apart) <= 0.01
        wanted = {"attention", "multi_tensor_l2norm", "multi_tensor_adam_capturable"}
        assert wanted <= set(calls), sorted(set(calls))
