"""Pipeline parallelism: any schedule on any number of ranks trains as one process does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.checkpoint.save import save_checkpoint
from fp8train.comm.processes import Layout, Processes, joined_processes
from fp8train.evaluation.validation import Text, evaluate
from fp8train.step.trainer import Trainer
from tests.checkpoint.loading import load_checkpoint
from tests.parallel.gradients.reading import gradient_of
from tests.training.tiny import VOCAB, alone, batches, tiny_config

SCHEDULES = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
STEPS = 2
MICRO_BATCHES = 4
FP64 = ("precision.compute=fp64",)
FP8 = (*FP64, "precision.gemm.fp8=true", "precision.profile=paper")  # delayed scales: state to compare
TIED = "model.family=gpt"
RECOMPUTE = "train.activation_checkpointing=full"


def make(overrides: list[str], processes: Processes) -> Trainer:
    """Four layers, four micro-batches on each of the data-parallel ranks."""
    batch = MICRO_BATCHES * processes.dp.size
    settings = ["model.num_layers=4", "data.seq_length=8", f"train.global_batch_size={batch}", *overrides]
    if processes.pp.size > 1:
        settings.append(f"parallel.pp={processes.pp.size}")
    return Trainer(tiny_config(settings), processes, vocab_size=VOCAB)


class Calls:
    """Counts forward calls of blocks and contributions to gradients."""

    def __init__(self, trainer: Trainer) -> None:
        self.forward: Counter[str] = Counter()
        self.gradients: Counter[str] = Counter()
        for name, block in trainer.model.layers.items():
            block.register_forward_pre_hook(lambda *_, name=name: self.forward.update([name]))
        for bucket in trainer.store.buckets:
            bucket.add = self._counting(bucket.add, [m.fqn for m in bucket.members])  # type: ignore[method-assign]

    def _counting(self, add: Any, fqns: list[str]) -> Any:
        def counted(member: int, gradient: Tensor, *, first: bool) -> None:
            self.gradients[fqns[member]] += 1
            add(member, gradient, first=first)

        return counted


def observe(overrides: list[str], processes: Processes, steps: int = STEPS) -> dict[str, Any]:
    """A few steps: what they returned, the first step's gradients, calls and the final state."""
    trainer = make(overrides, processes)
    data, calls = batches(trainer.config, processes), Calls(trainer)
    before = {} if trainer.scales is None else trainer.scales.state_tensors()
    assert not any(tensor.any() for tensor in before.values()), "set-up moved scale state"
    first = trainer.step(0, data.batch(0))
    seen = {"forward": dict(calls.forward), "contributions": dict(calls.gradients)}
    grads = {fqn: gradient_of(trainer.store, fqn).clone() for fqn in trainer.model.specs}
    results = [first] + [trainer.step(i, data.batch(i)) for i in range(1, steps)]
    text = Text(data, num_batches=1, ignore_after=None, token_lengths=None)
    valid = evaluate(trainer.summed_loss, text, processes)
    return {
        "losses": [float(r.loss) for r in results],
        "norms": [r.grad_norm for r in results],
        "valid": (valid.loss, valid.tokens),
        "grads": grads,
        "state": {name: tensor.clone() for name, tensor in trainer.state_tensors().items()},
        "sent": trainer.sent_bytes(),
        "order": completion_order(trainer),
        **seen,
    }


def completion_order(trainer: Trainer) -> list[int]:
    """Stages of this rank in the order in which the schedule finishes their weight gradients."""
    if trainer.pipeline is None or trainer.pipeline.placement.schedule == "1f1b":
        return []
    actions = trainer.pipeline._schedule.pipeline_order[trainer.processes.pp.rank]
    last: dict[int, int] = {}
    for i, action in enumerate(actions):
        if action is not None and str(action.computation_type) in ("B", "W"):
            last[action.stage_index] = i
    return sorted(last, key=lambda stage: last[stage])


def observe_all(
    group: dist.ProcessGroup, rank: int, world_size: int, pp: int, cases: dict[str, list[str]]
) -> dict[str, Any]:
    """Runs in the pool."""
    return {
        name: observe(overrides, joined_processes(torch.device("cpu"), Layout(pp=pp)))
        for name, overrides in cases.items()
    }


def with_schedule(schedule: str, *overrides: str) -> list[str]:
    return [*overrides, f"parallel.pipeline.schedule={schedule}"]


def references(gloo_pool, cases: dict[str, list[str]], dp: int = 1) -> dict[str, dict[str, Any]]:
    """One process (with as many threads as a rank) on the same global batches."""
    plain = {
        name: [
            *(o for o in overrides if "parallel." not in o and "traffic" not in o),
            f"train.global_batch_size={MICRO_BATCHES * dp}",
        ]
        for name, overrides in cases.items()
    }
    distinct = {repr(overrides): overrides for overrides in plain.values()}
    (found,) = gloo_pool.run(observe_all, 1, 1, distinct, timeout=900.0)
    return {name: found[repr(overrides)] for name, overrides in plain.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def relative(got: Tensor | list[float], expected: Tensor | list[float]) -> float:
    """Largest difference over the largest magnitude."""
    a, b = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def check(ranks: list[dict[str, Any]], expected: dict[str, Any], *, dp: int, tolerance: float) -> None:
    """All ranks against one process; ``tolerance`` of losses and norms, relative."""
    for got in ranks:
        assert got["losses"] == ranks[0]["losses"], "ranks disagree on the loss"
        assert got["norms"] == ranks[0]["norms"], "ranks disagree on the norm"
        assert got["valid"] == ranks[0]["valid"], "ranks disagree on the evaluation"
        assert relative(got["losses"], expected["losses"]) <= tolerance
        assert relative(got["norms"], expected["norms"]) <= tolerance
        assert relative([got["valid"][0]], [expected["valid"][0]]) <= tolerance
        assert got["valid"][1] == expected["valid"][1]
        assert got["order"] == sorted(got["order"], reverse=True), "later stages must finish first"
        forwards = expected["forward"]["0"] // dp
        assert set(got["forward"].values()) == {forwards}
        for fqn, count in got["contributions"].items():
            tied = fqn == "embedding.weight" and "head.weight" not in expected["grads"]
            uses = 2 if tied and {"final_norm.weight", "positions.weight"} <= got["grads"].keys() else 1
            assert count == expected["contributions"][fqn] // dp * uses, fqn
    held = Counter(fqn for got in ranks for fqn in got["grads"])
    assert held.keys() == expected["grads"].keys(), "a parameter is nowhere"
    states: dict[str, Tensor] = {}
    for got in ranks:
        for name, tensor in got["state"].items():
            assert same_bits(states.setdefault(name, tensor), tensor), f"copies of {name} differ"
    assert states.keys() == expected["state"].keys()


def check_to_the_bit_of_fp64(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Gradients and scale state of FP64 runs."""
    for got in ranks:
        for fqn, grad in got["grads"].items():
            assert relative(grad, expected["grads"][fqn]) <= 1e-12, fqn
        for name, tensor in got["state"].items():
            if name.startswith("scale_state/"):
                assert torch.equal(tensor, expected["state"][name]), name


FAST = {
    **{schedule: with_schedule(schedule, *FP8) for schedule in SCHEDULES},
    "1f1b-tied": with_schedule("1f1b", *FP64, TIED),
    "zbv-tied-recompute": with_schedule("zbv", *FP64, TIED, RECOMPUTE),
}
EXHAUSTIVE = {
    f"{schedule}{'-fp8' if numerics is FP8 else ''}{'-tied' if tied else ''}{'-' + mode if mode else ''}": [
        *with_schedule(schedule, *numerics, *([TIED] if tied else [])),
        *([f"train.activation_checkpointing={mode}"] if mode else []),
    ]
    for schedule in SCHEDULES
    for numerics in (FP64, FP8)
    for tied in (False, True)
    for mode in ("", "selective", "full")
}


def compare_fp64(gloo_pool, world_size: int, pp: int, cases: dict[str, list[str]]) -> None:
    ranks = gloo_pool.run(observe_all, world_size, pp, cases, timeout=900.0)
    for name, expected in references(gloo_pool, cases, world_size // pp).items():
        results = [result[name] for result in ranks]
        try:
            check(results, expected, dp=world_size // pp, tolerance=1e-9)
            check_to_the_bit_of_fp64(results, expected)
        except AssertionError as error:
            error.add_note(f"case {name}")
            raise


def test_every_schedule_trains_as_one_process_does(gloo_pool) -> None:
    compare_fp64(gloo_pool, 2, 2, FAST)


def test_pipelines_of_data_parallel_ranks(gloo_pool) -> None:
    compare_fp64(gloo_pool, 4, 2, {"zbv-fp8": with_schedule("zbv", *FP8)})


def test_four_stages(gloo_pool) -> None:
    compare_fp64(gloo_pool, 4, 4, {"1f1b-tied": with_schedule("1f1b", *FP64, TIED)})


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "pp"), [(2, 2), (4, 2)])
def test_every_combination(gloo_pool, world_size: int, pp: int) -> None:
    compare_fp64(gloo_pool, world_size, pp, EXHAUSTIVE)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_ranks_of_several_stages(gloo_pool, schedule: str) -> None:
    layers = "model.num_layers=8"
    cases = {
        "fp8": with_schedule(schedule, *FP8, layers),
        "tied": with_schedule(schedule, *FP64, layers, TIED),
    }
    compare_fp64(gloo_pool, 4, 4, cases)


# BF16 of an untied model: a stage computes what one process computes, so the first loss is the same to the
# bit, and so is everything after it as long as no sum over stages (the norm) rounds a clip factor otherwise.
LOW_PRECISION = {
    "O1": with_schedule("zbv", "precision.level=O1"),
    "O2": with_schedule("interleaved_zero_bubble", "precision.level=O2"),
    "O2-paper": with_schedule("1f1b", "precision.level=O2", "precision.profile=paper"),
    "O2-head": with_schedule("1f1b", "precision.level=O2", "precision.gemm.head=fp8"),
    "O2-tied": with_schedule("interleaved_1f1b", "precision.level=O2", TIED),
}


def test_levels(gloo_pool) -> None:
    ranks = gloo_pool.run(observe_all, 2, 2, LOW_PRECISION, timeout=900.0)
    for name, expected in references(gloo_pool, LOW_PRECISION).items():
        results = [result[name] for result in ranks]
        # Tied: one process rounds the sum of both uses to BF16, stages round each.
        check(results, expected, dp=1, tolerance=2e-3 if "tied" in name else 1e-6)
        assert results[0]["losses"][0] == expected["losses"][0], f"{name}: first loss"


def test_fp8_traffic_halves_the_bytes_and_stays_close(gloo_pool) -> None:
    base = with_schedule("zbv", "precision.level=O2")
    cases = {"compute": base, "fp8": [*base, "precision.traffic.pipeline=fp8"]}
    ranks = gloo_pool.run(observe_all, 2, 2, cases, timeout=900.0)
    expected = references(gloo_pool, {"compute": base})["compute"]
    for result in ranks:
        assert relative(result["fp8"]["losses"], expected["losses"]) < 5e-3
        assert result["fp8"]["losses"] != expected["losses"], "nothing was cast"
        for what in ("send/pipeline_states", "send/pipeline_gradients"):
            share = result["fp8"]["sent"][what] / result["compute"]["sent"][what]
            assert share == pytest.approx((1 + 1 / 32) / 2), what  # rows of 32 are one block each


EXACT = ["precision.level=O2", "precision.gradient.fp8.reduce=exact", "run.threads=1"]


def test_exact_reduction_does_not_depend_on_the_stages(gloo_pool) -> None:
    cases = {"exact": with_schedule("interleaved_1f1b", *EXACT)}
    ranks = gloo_pool.run(observe_all, 2, 2, cases, timeout=900.0)
    expected = references(gloo_pool, cases)["exact"]
    check([result["exact"] for result in ranks], expected, dp=1, tolerance=1e-15)
    for result in ranks:
        for name, tensor in result["exact"]["state"].items():
            assert same_bits(tensor, expected["state"][name]), name


def save_and_load(
    group: dist.ProcessGroup, rank: int, world_size: int, folder: Path
) -> tuple[dict[str, Tensor], bool, list[float]]:
    """Runs in the pool: saved state, whether a new trainer that loads it holds the same, and both losses of
    the step after."""
    processes = joined_processes(torch.device("cpu"), Layout(pp=2))
    overrides = with_schedule("zbv", "precision.level=O2", "precision.profile=paper", TIED)
    trainer = make(overrides, processes)
    data = batches(trainer.config, processes)
    for step in range(2):
        trainer.step(step, data.batch(step))
    saved = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
    save_checkpoint(
        folder, 2, saved, meta=trainer.state_meta(), rank_state={}, group=processes.control, keep_last=1
    )
    again = make(overrides, processes)
    loaded = load_checkpoint(folder / "step_00000002", again.state_tensors(), group=processes.control)
    again.check_meta(loaded.meta)
    again.restored(loaded.meta)
    found = again.state_tensors()
    same = found.keys() == saved.keys() and all(same_bits(found[name], saved[name]) for name in saved)
    return saved, same, [float(t.step(2, data.batch(2)).loss) for t in (trainer, again)]


def test_checkpoints_hold_every_stage(gloo_pool, tmp_path: Path) -> None:
    """Bit-identical after a restart, and loaded by one process."""
    results = gloo_pool.run(save_and_load, 2, tmp_path, timeout=900.0)
    alone_again = make(["precision.level=O2", "precision.profile=paper", TIED], alone())
    tensors = alone_again.state_tensors()
    load_checkpoint(tmp_path / "step_00000002", tensors, group=None)
    for saved, same, (loss, loss_again) in results:
        assert same
        assert loss == loss_again == results[0][2][0]
        assert all(same_bits(tensors[name], tensor) for name, tensor in saved.items())
    assert tensors.keys() == set().union(*(saved for saved, _, _ in results))


def skip_a_step(
    group: dist.ProcessGroup, rank: int, world_size: int
) -> tuple[bool, bool, bool, list[dict[str, dict[str, int]] | None]]:
    """Runs in the pool: the loss, which the last stage alone knows, becomes infinite in the second step."""
    processes = joined_processes(torch.device("cpu"), Layout(pp=2))
    trainer = make(with_schedule("1f1b", *FP8), processes)
    data, loss = batches(trainer.config, processes), trainer.model.loss
    trainer.step(0, data.batch(0))
    before = {name: t.clone() for name, t in trainer.state_tensors().items() if "/events/" not in name}
    trainer.model.loss = lambda *args: loss(*args) * float("inf")  # type: ignore[method-assign]
    events = [trainer.new_scale_events()]
    skipped = trainer.step(1, data.batch(1))
    events += [trainer.new_scale_events() for _ in range(2)]
    trainer.model.loss = loss  # type: ignore[method-assign]
    after = trainer.state_tensors()
    unchanged = all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return skipped.applied, unchanged, trainer.step(2, data.batch(2)).applied, events


def test_a_step_that_is_not_finite_changes_nothing_on_any_stage(gloo_pool) -> None:
    results = gloo_pool.run(skip_a_step, 2, timeout=900.0)
    assert [result[:3] for result in results] == [(False, True, True)] * 2
    # Both ranks name the output gradients of both stages, once.
    names = [
        f"layers.{layer}.{path}/grad_input.grad_output"
        for layer in range(4)
        for path in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert [result[3] for result in results] == [
        [{}, {key: {"zero": 0, "non_finite": 1} for key in names}, {}]
    ] * 2
