"""An outlier channel under ``precision.guard.action: recover``: found where it is, treated step by step
within the budget, alike on all ranks, in every run and after a resume."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8train.comm.processes import Layout
from fp8train.config.guard_schema import GuardConfig
from fp8train.step.guard import Guard
from fp8train.step.trainer import Trainer
from tests.distributed.test_safeguards import digest, trainer_of
from tests.training.tiny import batches

UNIT = "layers.1.mlp.down"
BUDGET = 2
SETTINGS = [
    *(
        "precision.level=O1",
        "precision.weights=compute",
        "logging.cast_statistics_interval=1",
        "model.num_layers=4",
    ),
    f"precision.guard={{action: recover, budget: {BUDGET}, lock: 2, learn: 3, saturated: 1}}",
]
DELAYED = ["precision.recipe=te_delayed"]
CASES: dict[str, tuple[int, Layout, list[str]]] = {
    "dp": (2, Layout(), DELAYED),
    "tp": (2, Layout(tp=2), ["parallel.tp=2"]),
    "pp": (2, Layout(pp=2), ["parallel.pp=2", *DELAYED]),
    "dp-tp": (4, Layout(tp=2), ["parallel.tp=2", *DELAYED]),
    "dp-pp": (4, Layout(pp=2), ["parallel.pp=2"]),
}
FIRST, STEPS, RESUMED = 5, 14, 9


def outlier(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One channel of what enters the linear is a thousand times as large; gradients know nothing of it."""
    factor = torch.ones(args[0].shape[-1], dtype=args[0].dtype)
    factor[3] = 1000
    return args[0] + (args[0] * (factor - 1)).detach(), *args[1:]


def observed(trainer: Trainer, steps: range) -> list[dict[str, Any]]:
    """What each step did, with the outlier from step ``FIRST`` on; every step is sampled."""
    data, guard = batches(trainer.config, trainer.processes), trainer.monitors.guard
    assert guard is not None and trainer.monitors.recorder is not None
    trainer.monitors.recorder.active = True
    found, handle = [], None
    for step in steps:
        if step >= FIRST and handle is None and UNIT in trainer.model.linears():
            handle = trainer.model.linears()[UNIT].register_forward_pre_hook(outlier)
        result = trainer.step(step, data.batch(step))
        events = [dict(event.fields) | {"text": event.text} for event in result.events]
        found.append(
            {
                "events": [event for event in events if "site" in event],
                "skipped": result.skipped,
                "rewind": result.rewind,
                "state": json.dumps(guard.state()),
                "treated": len(guard.locked) + len(guard.current),
            }
        )
    if handle is not None:
        handle.remove()
    return found


def recoveries(
    group: dist.ProcessGroup, rank: int, world_size: int, layout: Layout, overrides: list[str]
) -> dict[str, Any]:
    """Runs in the pool: a run, the same run again, and one that a checkpoint is taken of and goes on from."""
    settings = [*SETTINGS, *overrides]
    one, again, resumed = (trainer_of(layout, settings) for _ in range(3))
    steps = observed(one, range(STEPS))
    repeated = observed(again, range(RESUMED))
    for name, tensor in resumed.state_tensors().items():
        tensor.copy_(again.state_tensors()[name])
    resumed.restored(json.loads(json.dumps(again.state_meta())))
    later = observed(resumed, range(RESUMED, STEPS))
    repeated += observed(again, range(RESUMED, STEPS))
    return {
        "steps": steps,
        "same": repeated == steps and digest(again) == digest(one),
        "resumed": later == steps[RESUMED:] and digest(resumed) == digest(one),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_outlier_channel_is_treated_alike_everywhere(gloo_pool, name: str) -> None:
    size, layout, overrides = CASES[name]
    results = gloo_pool.run(recoveries, size, layout, overrides, timeout=400.0)
    assert all(result["same"] and result["resumed"] for result in results)
    assert all(result["steps"] == results[0]["steps"] for result in results), "ranks disagree"
    steps = results[0]["steps"]
    assert not any(step["events"] for step in steps[:FIRST])
    worst = steps[FIRST]["events"][0]
    unit = worst["site"].rpartition("/")[0]
    assert unit.startswith("layers.1.mlp."), worst
    assert max(step["treated"] for step in steps) <= BUDGET
    actions = [
        event["action"]
        for step in steps
        for event in step["events"]
        if event["site"].startswith(f"{unit}/") and event["action"] != "report"
    ]
    ladder = (
        ["current", "bf16", "skip", "rewind"]
        if "te_delayed" in str(overrides)
        else ["bf16", "skip", "rewind"]
    )
    assert actions[: len(ladder)] == ladder, actions
    rewinds = [step["rewind"] for step in steps if step["rewind"] is not None]
    assert unit in rewinds[0].pinned and not rewinds[0].skip_data
    assert {step["skipped"] for step in steps} == {"", "guard"}


def readings(kurtosis: float) -> dict[str, dict[str, float]]:
    return {"a/x": {"kurtosis": kurtosis, "rms": 1.0, "saturated": 0.0}}


def test_the_ladder_starts_anew_after_quiet_and_ends_with_the_total() -> None:
    config = GuardConfig.model_validate({"action": "recover", "lock": 4, "learn": 1, "total": 3})
    guard = Guard(config, ["a"], delayed=True)
    guard.observe(1, readings(3.0))
    found = []
    for step in (2, 3, 20, 40):
        guard.release(step)
        (flag,) = guard.observe(step, readings(900.0 * step))
        found.append((flag.action, flag.until))
    assert found == [("current", 6), ("bf16", 7), ("current", 24), ("report", None)]
    copy = Guard(config, ["a"], delayed=True)
    copy.load_state(json.loads(json.dumps(guard.state())))
    assert copy == guard
