"""A step that goes wrong on one rank: left out everywhere alike, traced, run again; what FP8 does about
trouble is the same on all ranks and in every run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8train.comm.processes import Layout, joined_processes
from fp8train.step.result import StepEvent, StepResult
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, batches, tiny_config

Change = Callable[[Tensor], Tensor]
LAYOUTS = {"dp": Layout(), "tp": Layout(tp=2), "pp": Layout(pp=2)}
FEEDBACK = ["precision.level=O2", "precision.gradient.fp8.error_feedback=true"]
CASES: dict[str, tuple[int, Layout, list[str]]] = {
    "dp-O0": (2, Layout(), ["precision.level=O0"]),
    "dp-O2-feedback": (2, Layout(), FEEDBACK),
    "dp-O2-exact": (2, Layout(), ["precision.level=O2", "precision.gradient.fp8.reduce=exact"]),
    "dp-O2-paper-zero": (2, Layout(), ["precision.level=O2", "precision.profile=paper", "parallel.zero=1"]),
    "dp-delayed": (2, Layout(), ["precision.level=O1", "precision.recipe=te_delayed"]),
    "tp-O2": (2, Layout(tp=2), ["precision.level=O2", "parallel.tp=2"]),
    "pp-O2": (2, Layout(pp=2), ["precision.level=O2", "parallel.pp=2"]),
    "dp-tp-O3": (4, Layout(tp=2), ["precision.level=O3", "parallel.tp=2"]),
    "dp-pp-O2-zero": (4, Layout(pp=2), ["precision.level=O2", "parallel.pp=2", "parallel.zero=1"]),
}


def trainer_of(layout: Layout, overrides: list[str]) -> Trainer:
    wide = ["model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=32", "model.ffn_hidden_size=256"]
    config = tiny_config(
        ["optimizer.lr=0.002", "run.threads=1", *(wide if layout.tp > 1 else []), *overrides]
    )
    return Trainer(config, joined_processes(torch.device("cpu"), layout), vocab_size=VOCAB)


def digest(trainer: Trainer) -> str:
    """Hash of everything that the next step starts from; counters of events alone are not among it."""
    sha = hashlib.sha256()
    for name, tensor in (*trainer.state_tensors().items(), *trainer.rank_tensors().items()):
        if not name.startswith("scale_state/events/"):
            sha.update(name.encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@contextmanager
def changed(trainer: Trainer, block: str, change: Change, *, backward: bool, times: int) -> Iterator[None]:
    """Change what a block puts out, or the gradient that comes back to it, ``times`` times; nothing on ranks
    that do not hold it."""
    left = times

    def once(x: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        return change(x) if left >= 0 else x

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output if backward else once(output)
        if not backward:
            return once(output)
        output = output.view_as(output)
        output.register_hook(once)
        return output

    modules = dict(trainer.model.named_modules())
    handles = [modules[block].register_forward_hook(hook)] if block in modules else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nan(x: Tensor) -> Tensor:
    return x * math.nan


def kinds(result: StepResult) -> dict[str, StepEvent]:
    return {event.kind: event for event in result.events}


def skips(group: dist.ProcessGroup, rank: int, world_size: int, names: list[str]) -> dict[str, Any]:
    """Runs in the pool: a NaN on one rank in step 2, next to a run that never takes that step."""
    found = {}
    for name in names:
        _, layout, overrides = CASES[name]
        trainer, told = trainer_of(layout, overrides), trainer_of(layout, overrides)
        data = batches(trainer.config, trainer.processes)
        for step in range(2):
            trainer.step(step, data.batch(step))
            told.step(step, data.batch(step))
        before = digest(trainer)
        guilty = rank == world_size - 1
        with changed(trainer, "layers.1", nan, backward=True, times=9 if guilty else 0):
            result = trainer.step(2, data.batch(2))
        unchanged = digest(trainer) == before
        for step in (3, 4):
            assert trainer.step(step, data.batch(step)).applied
            told.step(step, data.batch(step))
        event = kinds(result)["not_finite"]
        found[name] = {
            "skipped": result.skipped,
            "unchanged": unchanged,
            "as if": digest(trainer) == digest(told),
            "fields": dict(event.fields),
        }
    return found


def guilty_ranks(name: str) -> list[int]:
    """The one that was broken; its tensor-parallel peers get the NaN within the step."""
    size, layout, _ = CASES[name]
    return [size - 2, size - 1] if layout.tp == 2 else [size - 1]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_nan_on_one_rank_is_left_out_by_all_as_if_they_were_told_to(gloo_pool, size: int) -> None:
    names = [name for name, (ranks, _, _) in CASES.items() if ranks == size]
    for found in gloo_pool.run(skips, size, names, timeout=300.0):
        for name, case in found.items():
            assert (case["skipped"], case["unchanged"], case["as if"]) == ("not_finite", True, True), name
            fields = case["fields"]
            assert (fields["where"], fields["ranks"]) == ("backward", guilty_ranks(name)), (name, fields)
            assert fields["parameter"].startswith("layers.1.mlp.down"), (name, fields)


def forward_nan(group: dist.ProcessGroup, rank: int, world_size: int, times: int) -> dict[str, Any]:
    """Runs in the pool: rank 1's block 0 puts out NaN."""
    trainer = trainer_of(Layout(), ["precision.level=O2"])
    data = batches(trainer.config, trainer.processes)
    with changed(trainer, "layers.0", nan, backward=False, times=times if rank == 1 else 0):
        result = trainer.step(0, data.batch(0))
    return {**kinds(result)["not_finite"].fields, "text": kinds(result)["not_finite"].text}


def test_a_nan_in_forward_is_traced_to_rank_and_module(gloo_pool) -> None:
    for found in gloo_pool.run(forward_nan, 2, 99):
        assert (found["where"], found["ranks"], found["module"]) == ("forward", [1], "layers.0")
    for found in gloo_pool.run(forward_nan, 2, 1):
        assert (found["ranks"], found["module"]) == ([1], None)
        assert "transient" in found["text"]


RERUN = ["run.deterministic=true", "spikes={rerun: true, min_steps: 3, window: 8}"]


def flip(x: Tensor) -> Tensor:
    """The highest bit of one element's exponent."""
    x = x.clone()
    bits = x.view(-1).view({2: torch.int16, 4: torch.int32}[x.element_size()])
    bits[7] ^= 1 << (8 * x.element_size() - 2)
    return x


def large(x: Tensor) -> Tensor:
    return x * 1000


def reruns(
    group: dist.ProcessGroup, rank: int, world_size: int, layout: Layout, overrides: list[str]
) -> dict[str, Any]:
    """Runs in the pool: a flipped bit in the gradient of an activation, and then a spike that is there again
    in the second run, both on the last rank."""
    trainer, quiet = (trainer_of(layout, [*overrides, *RERUN]) for _ in range(2))
    data = batches(trainer.config, trainer.processes)
    last = rank == world_size - 1
    found: dict[str, Any] = {}
    for step in range(6):
        change, times = (flip, 1) if step == 4 else (large, 99)
        with changed(trainer, "layers.1", change, backward=True, times=times if last and step > 3 else 0):
            result = trainer.step(step, data.batch(step))
        if step < 5:
            assert not quiet.step(step, data.batch(step)).events
        found[str(step)] = {event.kind: dict(event.fields) for event in result.events}
        if step == 4:
            found["same"] = digest(trainer) == digest(quiet)
    return found


RERUN_CASES = {
    "dp": (2, Layout(), FEEDBACK, [1]),
    "tp": (2, Layout(tp=2), ["precision.level=O1", "precision.recipe=te_delayed", "parallel.tp=2"], [0, 1]),
    "pp": (2, Layout(pp=2), [*FEEDBACK, "parallel.pp=2"], [0, 1]),
}


@pytest.mark.parametrize(
    "name", ["dp", pytest.param("tp", marks=pytest.mark.slow), pytest.param("pp", marks=pytest.mark.slow)]
)
def test_a_flipped_bit_is_blamed_on_its_rank_and_mended_a_lasting_spike_on_the_data(
    gloo_pool, name: str
) -> None:
    size, layout, overrides, ranks = RERUN_CASES[name]
    for found in gloo_pool.run(reruns, size, layout, overrides, timeout=300.0):
        assert set(found["4"]) == {"corruption_suspected"}, found["4"]
        assert found["4"]["corruption_suspected"]["ranks"] == ranks
        assert found["same"], "the second run of the step is the one of a machine without the fault"
        assert set(found["5"]) == {"reproduced", "spike"}, found["5"]
        assert found["5"]["reproduced"]["ranks"] == []
