"""What a run records about its loss: of the logged step alone, and of all steps since the one before."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp8train.live.reporter import Reporter
from fp8train.run_dir.metrics import read_metrics
from fp8train.step.result import StepResult
from tests.inference.trained import train_small


def test_the_mean_loss_is_that_of_all_steps_since_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def losses(folder: Path, interval: int) -> dict[int, tuple[float, float]]:
        folder.mkdir()
        run = train_small(folder, f"logging.interval={interval}", "train.eval_interval=0")
        records = [record for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
        return {int(r["step"]): (r["train/loss"], r["train/loss_mean"]) for r in records}

    each = {step: loss for step, (loss, _) in losses(tmp_path / "every", 1).items()}
    assert sorted(each) == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    windows = {1: (1,), 4: (2, 3, 4), 6: (5, 6)}
    found = losses(tmp_path / "some", 4)
    assert found == {
        last: (each[last], pytest.approx(statistics.fmean(each[step] for step in steps), rel=1e-12))
        for last, steps in windows.items()
    }
    shown = [float(text) for text in re.findall(r"\| loss (\S+)", capsys.readouterr().out)]
    assert shown == [pytest.approx(mean, abs=5e-5) for _, mean in found.values()]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({}, "loss or gradient is not finite (norm nan); weights left unchanged"),
        (
            {"partly": True},
            "loss or gradient is not finite (norm nan); "
            "weights before that in backward are new, the others unchanged",
        ),
        ({"skipped": "no_targets"}, "not one target token in the global batch; weights left unchanged"),
    ],
    ids=["skipped", "partly", "no targets"],
)
def test_a_skipped_step_says_what_it_left(result: dict[str, Any], said: str) -> None:
    lines: list[str] = []
    events: list[dict[str, Any]] = []
    reporter: Any = SimpleNamespace(
        say=lines.append, event=lambda kind, **values: events.append({"kind": kind, **values})
    )
    Reporter.skipped(
        reporter, 7, StepResult(torch.tensor(1.5), math.nan, 0.1, **{"skipped": "not_finite", **result})
    )
    assert lines == [f"step 7: {said}"]
    (event,) = events
    assert (event["kind"], event["step"], event["partly"]) == ("step_skipped", 7, result.get("partly", False))
