"""A spike sends the run back to its newest checkpoint, and it goes on without the data that led there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fp8train.checkpoint.catalog import candidates
from fp8train.checkpoint.description import read_meta_file
from fp8train.cli import run_command
from fp8train.data.batches import GlobalBatches
from fp8train.step.trainer import Trainer
from tests.training.launching import history, weights, write_config

pytestmark = pytest.mark.usefixtures("one_thread")
SPIKES = "spikes={action: rollback, min_steps: 4, window: 8, data_window: 2}"
POISONED = 9
"""Its step is the tenth; the newest checkpoint is of step 8."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("rollback"))


def train(config: Path, name: str, *overrides: str) -> tuple[int, Path]:
    words = ["train", str(config), f"run.dir={config.parent}", f"run.name={name}", "train.steps=16"]
    words += ["train.global_batch_size=4", "logging.cast_statistics_interval=0", "checkpoint.keep_last=9"]
    return run_command(
        [*words, "train.eval_interval=0", "precision.level=O2", *overrides]
    ), config.parent / name


class Poison:
    """Some data whose gradients are a million times too large, wherever and whenever it is trained on; and
    calls, by number, in which the machine dies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data: list[Tensor] = []
        self.calls, self.dies_at = 0, -1
        accumulate = Trainer._accumulate

        def poisoned(trainer: Trainer, inputs: Tensor, targets: Tensor, tokens: Any) -> Tensor:
            self.calls += 1
            if self.calls == self.dies_at:
                raise RuntimeError("killed")
            bad = any(inputs.shape == x.shape and bool((inputs == x).all()) for x in self.data)
            return accumulate(trainer, inputs, targets, tokens / 1e6 if bad else tokens)

        monkeypatch.setattr(Trainer, "_accumulate", poisoned)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_it_trains_on_as_if_the_data_had_never_been_there(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if it dies before the next checkpoint, and after it."""
    poison, batch = Poison(monkeypatch), GlobalBatches.batch
    seen: dict[int, Tensor] = {}

    def without(batches: GlobalBatches, step: int) -> Tensor:
        seen[step] = batch(batches, step)
        return seen[step] if step < 8 else batch(batches, step + 2)

    with monkeypatch.context() as patch:
        patch.setattr(GlobalBatches, "batch", without)
        status, truth = train(config, "truth")
    assert status == 0

    poison.data = [seen[POISONED][..., :-1]]
    status, run = train(config, "run", SPIKES)
    assert status == 0
    assert history(run) == history(truth)
    assert weights(run, 16) == weights(truth, 16)
    (told,) = events(run, "rollback")
    assert (told["step"], told["from_step"], told["number"]) == (8, 10, 1)
    assert told["left_out"] == [[8 * 4, 10 * 4]]
    assert told["cause"].startswith("spike: grad norm")
    assert "went back to" in capsys.readouterr().out
    assert read_meta_file(run / "checkpoints" / "step_00000012")[1]["data"]["left_out"] == [[32, 40]]

    for name, calls in (("early", 8 + 2 + 1), ("late", 8 + 2 + 6)):
        poison.calls, poison.dies_at = 0, calls
        with pytest.raises(RuntimeError, match="killed"):
            train(config, name, SPIKES)
        poison.dies_at = -1
        status, run = train(config, name, SPIKES, "checkpoint.resume=auto")
        assert status == 0
        assert history(run) == history(truth), name
        assert weights(run, 16) == weights(truth, 16), name
        assert len(events(run, "rollback")) == (2 if name == "early" else 1)


def test_the_budget_ends_and_without_a_checkpoint_a_spike_is_skipped(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, batch = Poison(monkeypatch), GlobalBatches.batch

    def always(batches: GlobalBatches, step: int) -> Tensor:
        found = batch(batches, step)
        poison.data = [found[..., :-1]] if step in (5, 9) else []
        return found

    monkeypatch.setattr(GlobalBatches, "batch", always)
    status, run = train(config, "budget", SPIKES.replace("}", ", max_rollbacks: 2}"), "checkpoint.interval=8")
    assert status == 0
    assert [row["step"] for row in events(run, "rollback_impossible")] == [6]
    assert [(row["step"], row["number"]) for row in events(run, "rollback")] == [(8, 1), (8, 2)]
    assert [row["step"] for row in events(run, "step_skipped")] == [6, 10]
    assert candidates(run / "checkpoints")[0].name == "step_00000016"
