"""What a run records about its loss: of the logged step alone, and of all steps since the one before."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from fp8train.run_dir.metrics import read_metrics
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
