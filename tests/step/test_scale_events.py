"""Amaxes that give no delayed scale, from the cast to metrics.jsonl and events.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.cli import run_command
from fp8train.run_dir.metrics import read_metrics
from fp8train.step.result import StepResult
from fp8train.step.scale_events import SHOWN
from fp8train.step.trainer import Trainer
from tests.training.launching import write_config
from tests.training.tiny import VOCAB, alone, batches, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
DELAYED = ["precision.gemm.fp8=true", "precision.profile=paper"]


def test_events_are_new_once() -> None:
    config = tiny_config(DELAYED)
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    trainer.step(0, batches(config, alone()).batch(0))
    assert trainer.new_scale_events() == {}
    assert trainer.scales is not None
    trainer.scales.events[trainer.scales.names.index("layers.1.mlp.down/output.x")] += torch.tensor([2, 1])
    assert trainer.new_scale_events() == {"layers.1.mlp.down/output.x": {"zero": 2, "non_finite": 1}}
    assert trainer.new_scale_events() == {}
    trainer.scales.events += 1  # as a checkpoint does that is loaded
    trainer.restored({"updates": 1})
    assert trainer.new_scale_events() == {}


def test_nothing_is_said_without_delayed_scales() -> None:
    for overrides in ([], ["precision.gemm.fp8=true"]):
        assert Trainer(tiny_config(overrides), alone(), vocab_size=VOCAB).new_scale_events() is None


def test_a_run_logs_them_by_name_and_once_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 of 8 see no gradient from the last of three blocks on; logging comes at 1, 3, 6 and 8."""
    step, looked = Trainer.step, []
    take = Trainer.new_scale_events

    def with_zeros(trainer: Trainer, index: int, micro_batches: Tensor) -> StepResult:
        factor = 0.0 if index + 1 in (3, 4) else 1.0
        last = trainer.model.held_blocks()[-1]
        hook = last.register_full_backward_pre_hook(lambda block, grads: [factor * grad for grad in grads])
        result = step(trainer, index, micro_batches)
        hook.remove()
        return result

    def counted(trainer: Trainer) -> dict[str, dict[str, int]] | None:
        looked.append(trainer.updates)
        return take(trainer)

    monkeypatch.setattr(Trainer, "step", with_zeros)
    monkeypatch.setattr(Trainer, "new_scale_events", counted)
    words = ["train", str(write_config(tmp_path)), f"run.dir={tmp_path}", "run.name=zeros", "train.steps=8"]
    words += ["train.eval_interval=0", "checkpoint.interval=0", "logging.interval=3"]
    words += ["model.num_layers=3", *DELAYED]
    assert run_command(words) == 0
    assert looked == [1, 3, 6, 8]  # the device is asked on logged steps only
    lines = (tmp_path / "zeros/events.jsonl").read_text().splitlines()
    events: list[dict[str, Any]] = [e for e in map(json.loads, lines) if e["kind"] == "scale_events"]
    # One cast of an output gradient for both of its GEMMs, in four linears of three blocks.
    names = [
        f"layers.{layer}.{path}/grad_input.grad_output"
        for layer in range(3)
        for path in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    ]
    assert [(event["step"], event["more"]) for event in events] == [(3, 12 - SHOWN), (6, 12 - SHOWN)]
    for event in events:
        assert event["slots"] == {key: {"zero": 1, "non_finite": 0} for key in names[:SHOWN]}
    rows = read_metrics(tmp_path / "zeros/metrics.jsonl")
    assert [row["fp8/zero_amaxes"] for row in rows] == [0, 12, 12, 0]
    assert [row["fp8/non_finite_amaxes"] for row in rows] == [0, 0, 0, 0]
