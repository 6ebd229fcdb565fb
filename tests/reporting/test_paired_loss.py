"""``tools/paired_loss.py``: arms, runs that share their batches, and the interval of a table by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.training.launching import write_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as for a script that is run there

from paired_loss import Arm, parse_arm, table, train  # noqa: E402

SHORT = ["train.steps=4", "optimizer.clip_grad_norm=0"]


def test_an_arm_has_settings_and_perhaps_an_accumulator() -> None:
    assert parse_arm("O2: precision.level=O2") == Arm("O2", ("precision.level=O2",), None)
    assert parse_arm("few bits: precision.level=O2 accumulator=fast9 evaluate=promoted13") == Arm(
        "few bits", ("precision.level=O2",), ("fast", 9), (("promoted", 13),)
    )


def test_arms_differ_by_their_settings_alone(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arms = (
        "O2: precision.level=O2 evaluate=fast17 evaluate=fast4",
        "same: precision.level=O2",
        "few: precision.level=O2 accumulator=fast4",
    )
    runs = [train(config, parse_arm(arm), 3, SHORT) for arm in arms]
    assert runs[0]["loss"] == runs[1]["loss"]
    assert runs[0]["loss"] != runs[2]["loss"]
    assert runs[0]["loss"] == pytest.approx(runs[2]["loss"], rel=0.05)
    assert runs[2]["accumulator"] == ("fast", 4)
    again = runs[0]["evaluated_with"]
    assert again["fast17"] == pytest.approx(runs[0]["loss"], rel=1e-4)
    assert again["fast4"] == pytest.approx(runs[0]["loss"], rel=0.02)
    assert again["fast4"] != again["fast17"]
    assert {run["skipped"] for run in runs} == {0}
    assert train(config, parse_arm(arms[0]), 4, SHORT)["loss"] != runs[0]["loss"]
    assert not (tmp_path / "runs").exists()


def test_the_interval_is_students() -> None:
    """Differences 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3), t = 4.303 of two degrees of
    freedom."""
    runs = [{"name": "a", "seed": seed, "loss": 2.0 + seed} for seed in (1, 2, 3, 4)]
    runs += [{"name": "b", "seed": seed, "loss": 2.0 + seed + 0.01 * seed} for seed in (1, 2, 3)]
    lines = table(["a", "b"], "a", runs).splitlines()
    assert lines[2] == "| a | 4.5000 |  |  | 4 |  |"
    assert lines[3].startswith("| b | 4.0200 | +0.0200 | -0.0048 to +0.0448 | 3 | ")
    for run in runs[:2]:
        run["evaluated_with"] = {"fast13": run["loss"] + 1e-4 * run["seed"]}
    # 1e-4 and 2e-4: half their distance times t = 12.706 of one degree of freedom
    last = table(["a"], "a", runs).splitlines()[-1]
    assert last.startswith("| a, evaluated in fast13 | 3.5002 | +1.5e-04 | -4.9e-04 to +7.9e-04 | 2 | ")
