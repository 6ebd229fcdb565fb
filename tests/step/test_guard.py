"""The guard finds the linear in trouble, takes no more than its budget out of FP8, and all ranks agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Layout, Processes, joined_processes
from fp8train.config.errors import ConfigError
from fp8train.config.guard_schema import GuardConfig
from fp8train.config.recipe_registry import RECIPES
from fp8train.numerics.statistics import FIELDS
from fp8train.step.guard import Flag, Guard, agreed_readings
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, tiny_config

UNITS = ("layers.0.mlp.up", "layers.0.mlp.down", "layers.1.mlp.up", "layers.1.mlp.down")
DOWN = "layers.1.mlp.down"


def table(**changes: float) -> dict[str, dict[str, float]]:
    """Ordinary readings of all units; ``changes``: kurtosis of ``{unit, dots and all}/x``."""
    quiet = {"kurtosis": 3.0, "rms": 1.0, "saturated": 0.0}
    found = {f"{unit}/{operand}": dict(quiet) for unit in UNITS for operand in ("x", "w", "grad_output")}
    for unit, kurtosis in changes.items():
        found[f"{unit}/x"]["kurtosis"] = kurtosis
    return found


def taught(**settings: float | str) -> Guard:
    """A guard that knows what is usual after steps 10 to 50."""
    guard = Guard(GuardConfig.model_validate({"action": "bf16", "budget": 2, **settings}), UNITS)
    for step in range(10, 60, 10):
        assert guard.observe(step, table()) == []
    return guard


def test_the_worst_are_locked_within_the_budget_and_come_back() -> None:
    guard = taught(lock=100, rise=4)
    bad = {UNITS[0]: 13.0, UNITS[1]: 300.0, UNITS[2]: 11.9, UNITS[3]: 30.0}
    flags = guard.observe(60, table(**bad))
    assert [(flag.unit, flag.until) for flag in flags] == [
        (UNITS[1], 160),
        (UNITS[3], 160),
        (UNITS[0], None),  # no budget left; 11.9 is not 4 times 3
    ]
    assert flags[0] == Flag(UNITS[1], f"{UNITS[1]}/x", "kurtosis", 300.0, 3.0, 160, "bf16")
    assert guard.observe(70, table(**{UNITS[1]: 1e6})) == [], "a linear out of FP8 has no readings"
    assert guard.release(160) == []
    assert guard.release(161) == [UNITS[1], UNITS[3]]
    assert guard.locked == {}


def test_a_lasting_change_becomes_usual() -> None:
    guard = taught(lock=1, rise=4)
    judged = []
    for step in range(60, 400, 10):
        guard.release(step)
        judged.append(bool(guard.observe(step, table(**{DOWN: 60.0}))))
    assert judged[0] and not any(judged[12:]), judged


def test_readings_of_zeros_teach_nothing() -> None:
    """A batch without targets has gradients of zeros: neither the first nor many of them may blind the guard,
    or make what follows an alarm."""
    settings = {"action": "bf16", "rise": 4, "learn": 3}
    guard = Guard(GuardConfig.model_validate(settings), UNITS)
    zeros = {site: dict.fromkeys(readings, 0.0) for site, readings in table().items()}
    for step, readings in enumerate([zeros, table(), table(), table(), *[zeros] * 20, table()]):
        assert guard.observe(step, readings) == []
    assert [flag.unit for flag in guard.observe(99, table(**{DOWN: 13.0}))] == [DOWN]


def test_reporting_locks_nothing_and_saturation_and_infinities_need_no_history() -> None:
    guard = Guard(GuardConfig(action="report", saturated=1e-3), UNITS)
    readings = table()
    readings[f"{UNITS[2]}/grad_output"]["saturated"] = 2e-3
    readings[f"{UNITS[0]}/x"] = dict.fromkeys(("kurtosis", "rms", "saturated"), math.inf)
    flags = guard.observe(1, readings)
    assert [(flag.unit, flag.until) for flag in flags] == [(UNITS[0], None), (UNITS[2], None)]
    assert "not finite" in str(flags[0])
    assert guard.locked == {}


def test_state_survives_a_checkpoint() -> None:
    guard = taught()
    guard.observe(60, table(**{DOWN: 99.0}))
    copy = Guard(guard.config, UNITS)
    copy.load_state(guard.state())
    assert copy == guard
    fewer = Guard(guard.config, UNITS[:1])
    fewer.load_state(guard.state())
    assert fewer.locked == {}
    only_reports = Guard(GuardConfig(action="report"), UNITS)
    only_reports.load_state(guard.state())
    assert only_reports.locked == {}


def test_rows_of_two_ranks_become_their_largest_readings(gloo_pool) -> None:
    for found in gloo_pool.run(read_on_two_ranks, 2):
        assert found == {
            "a/x": {"kurtosis": 8.0, "rms": 3.0, "saturated": 0.5},
            "b/x": dict.fromkeys(("kurtosis", "rms", "saturated"), math.inf),
        }


def read_on_two_ranks(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, dict[str, float]]:
    """Runs in the pool: site c was never recorded; b's source held a NaN on rank 1."""
    rows = torch.full((3, len(FIELDS)), torch.nan)
    names = ("amax", "rms", "zero", "saturated", "kurtosis")
    columns = [FIELDS.index(name) for name in names]
    rows[0, columns] = torch.tensor([1.0, 3.0 - rank, 0.0, 0.5 * rank, 2.0 + 6 * rank])
    rows[1, columns] = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    if rank == 1:
        rows[1, columns] = torch.tensor([torch.nan, torch.nan, 0.0, 0.0, torch.nan])
    return dict(agreed_readings(["a/x", "b/x", "c/x"], rows, CountedGroup(group)))


class Flagged(NamedTuple):
    """A flag as the log has it."""

    unit: str
    text: str


def guarded_trainer(processes: Processes, *overrides: str) -> Trainer:
    settings = [
        *("precision.level=O1", "precision.weights=compute", "logging.cast_statistics_interval=1"),
        *("precision.guard={action: bf16, budget: 2, lock: 3, learn: 3}", "optimizer.lr=1e-5"),
        *("model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_layers=3"),
    ]
    return Trainer(tiny_config([*settings, *overrides]), processes, vocab_size=VOCAB)


def run(trainer: Trainer, steps: range) -> list[list[Flagged]]:
    """Flags of each step, all of them sampled, as the log has them."""
    assert trainer.monitors.recorder is not None
    trainer.monitors.recorder.active = True
    data = batches(trainer.config, trainer.processes)
    flags = []
    for step in steps:
        result = trainer.step(step, data.batch(0))
        assert result.applied
        found = [event for event in result.events if event.kind == "guard"]
        flags.append([Flagged(one.fields["site"].rpartition("/")[0], one.text) for one in found])
    return flags


def put_outlier(trainer: Trainer) -> None:
    """Gate and up rows of one channel of one block aligned and large, as weight decay does to SwiGLU."""
    mlp = trainer.model.held_blocks()[1].mlp
    master = trainer.optimizer.states.master("layers.1.mlp.up.weight").clone()
    gate, up = master.unflatten(0, (-1, 2, mlp.unit))[0].unbind(0)
    gate[3] *= 12
    up[3] = gate[3]
    trainer.optimizer.states.seed_master("layers.1.mlp.up.weight", master)
    trainer.optimizer.publish()


CURRENT = [name for name in RECIPES if not name.startswith("te_delayed")]
IN_CI = ("current", "rowwise", "mus")
MARKED = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in CURRENT]


@pytest.mark.parametrize("recipe", MARKED)
def test_an_outlier_channel_is_localised_under_every_recipe(recipe: str) -> None:
    everywhere = ["precision.gemm.exclude=[]"] if recipe == "umup" else []  # it leaves down in BF16
    trainer = guarded_trainer(alone(), f"precision.recipe={recipe}", *everywhere)
    assert trainer.monitors.guard is not None
    before = run(trainer, range(4))
    assert before == [[], [], [], []]
    put_outlier(trainer)
    flags = run(trainer, range(4, 5))[0]
    watched = DOWN
    assert flags[0].unit == watched, flags
    assert watched in trainer.monitors.guard.locked and len(trainer.monitors.guard.locked) <= 2
    locked, linears = set(trainer.monitors.guard.locked), trainer.model.linears()
    later = run(trainer, range(5, 8))
    assert {name for name, one in linears.items() if one.leaves_fp8} >= locked
    assert all(flag.unit != watched for flags in later for flag in flags), "it is out of FP8 for 3 steps"
    trainer.step(8, batches(trainer.config, alone()).batch(0))
    assert not linears[watched].leaves_fp8


def biased(trainer: Trainer, path: str) -> None:
    """Add a constant to what enters a linear, as a biased attention output would."""
    trainer.model.linears()[path].register_forward_pre_hook(lambda _, args: (args[0] + 3.0,))


def biased_on_rank_one(
    group: dist.ProcessGroup, rank: int, world_size: int, overrides: list[str]
) -> tuple[list[str], dict[str, int]]:
    """Runs in the pool: the bias is in rank 1's activations alone."""
    layout = Layout(pp=2) if overrides else Layout()
    trainer = guarded_trainer(joined_processes(torch.device("cpu"), layout), *overrides)
    run(trainer, range(4))
    if rank == 1:
        biased(trainer, "layers.2.attention.out")
    flags = run(trainer, range(4, 5))[0]
    assert trainer.monitors.guard is not None
    return [flag.text for flag in flags], trainer.monitors.guard.locked


@pytest.mark.parametrize("overrides", [[], ["parallel.pp=2"]], ids=["dp", "pp"])
def test_a_biased_output_on_one_rank_makes_all_ranks_decide_alike(gloo_pool, overrides: list[str]) -> None:
    first, second = gloo_pool.run(biased_on_rank_one, 2, overrides)
    assert first == second
    flags, locked = first
    assert flags[0].startswith("guard: layers.2.attention.out/x rms"), flags
    assert "layers.2.attention.out" in locked and len(locked) <= 2


def test_out_of_fp8_a_linear_multiplies_in_the_compute_type() -> None:
    trainer = guarded_trainer(alone(), "precision.compute=fp32")
    seen: dict[str, Tensor] = {}
    hook: Callable[..., None] = lambda _, args, y: seen.update(x=args[0].detach(), y=y.detach())  # noqa: E731
    linear = trainer.model.linears()[DOWN]
    linear.register_forward_hook(hook)
    data = batches(trainer.config, alone())
    errors = []
    for leaves in (False, True):
        linear.leaves_fp8, weight = leaves, linear.weight.detach().double().clone()
        trainer.step(0, data.batch(0)[:1])
        exact = seen["x"].double() @ weight.t()
        errors.append(float((seen["y"].double() - exact).norm() / exact.norm()))
    assert errors[0] > 5e-3, "FP8 rounds by some per cent"
    assert errors[1] < 1e-6


def test_out_of_fp8_a_linear_has_no_rows() -> None:
    """Not those of its last step in FP8 either."""
    trainer = guarded_trainer(alone())
    run(trainer, range(1))
    assert trainer.monitors.guard is not None
    trainer.monitors.guard.locked = {DOWN: 3}
    trainer.monitors._apply_guard()
    run(trainer, range(1, 2))
    sites = trainer.monitors.cast_rows().keys()
    assert not {f"{DOWN}/x", f"{DOWN}/grad_output"} & sites
    assert f"{DOWN}/w" in sites and "layers.0.mlp.down/x" in sites
    run(trainer, range(3, 4))
    assert {f"{DOWN}/x", f"{DOWN}/grad_output"} <= trainer.monitors.cast_rows().keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["precision.level=O1", "precision.recipe=te_delayed", "precision.weights=compute"],
            "scale_source is delayed",
        ),
        (["precision.level=O3"], "weights: fp8 keeps none"),
        (["precision.level=O0"], "gemm.fp8 is false"),
        (["precision.level=O1", "precision.weights=compute", "train.compile=block"], "train.compile"),
        (
            ["precision.level=O1", "precision.weights=compute", "logging.cast_statistics_interval=0"],
            "cast_statistics_interval is 0",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(["logging.cast_statistics_interval=5", "precision.guard.action=bf16", *overrides])
