"""``tools/sweep_lr.py``: a sweep that is killed and continued, and the optimum against known parabolas."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fp8train.config.errors import UserError
from fp8train.config.resolve import load_config
from tests.training.launching import write_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as for a script that is run there

import sweep_jobs  # noqa: E402
import sweep_lr  # noqa: E402
from sweep_table import (  # noqa: E402
    Optimum,
    find_optimum,
    format_lr,
    plot_sweep,
    sweep_table,
    transfer_slope,
)

OPTIONS = ["--widths", "32", "64", "--head-dim", "16", "--steps", "5", "--lrs", "2^-8", "0.03125"]
OPTIONS += ["--overrides", "model.num_layers=1", "model.num_kv_heads=4"]


def command(config: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools/sweep_lr.py"),
        str(config),
        "--out",
        str(out),
        *OPTIONS,
        *options,
    ]


def sweep(config: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, out, *options), capture_output=True, text=True, timeout=170, check=False
    )


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_sweep_continues(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "sweep"
    first = subprocess.Popen(command(config, out), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "sweep.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)  # its second run is left behind, running
    first.wait()
    before = json.loads((out / "sweep.json").read_text())["runs"]
    assert 1 <= len(before) < 4
    written = {run["run"]: (out / "runs" / run["run"] / "status.json").stat().st_mtime_ns for run in before}

    done = sweep(config, out, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert f"4 runs, {len(before)} of them known; 2 at a time" in done.stdout
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert runs[: len(before)] == before
    for name, at in written.items():
        assert (out / "runs" / name / "status.json").stat().st_mtime_ns == at, "trained again"
    assert sorted((run["width"], run["lr"]) for run in runs) == [
        (width, lr) for width in (32, 64) for lr in (2**-8, 2**-5)
    ]
    assert len(list((out / "runs").glob("*/"))) == 4
    for run in runs:
        check_run(out / "runs" / run["run"], run)
    for run in runs:
        assert f"{run['loss']:.4f}" in (out / "sweep.md").read_text()
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")

    again = sweep(config, out)
    assert "4 runs, 4 of them known" in again.stdout
    assert json.loads((out / "sweep.json").read_text())["runs"] == runs


def check_run(folder: Path, run: dict[str, Any]) -> None:
    """A result against the run's own records."""
    losses = [row["train/loss"] for row in records(folder / "metrics.jsonl")]
    assert len(losses) == 5
    assert (run["initial_loss"], run["loss"], run["diverged"]) == (losses[0], losses[-1], "")
    assert sum(event["kind"] == "model" for event in records(folder / "events.jsonl")) == 1
    lr = [row["optim/lr"] for row in records(folder / "metrics.jsonl")]
    assert max(lr) == pytest.approx(run["lr"], rel=0.1), "cosine, so the first step is near the peak"
    model = load_config(folder / "config.yaml").config.model
    width = run["width"]
    assert (model.hidden_size, model.head_dim, model.num_heads) == (width, 16, width // 16)
    assert (model.num_kv_heads, model.ffn_hidden_size, model.num_layers) == (width // 16, 4 * width, 1)


def test_a_run_that_fails_ends_the_sweep_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    words = [str(config), "--out", str(tmp_path / "out"), "--widths", "64", "--lrs", "0.01", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["sweep_lr.py", *words, "--overrides", "data.prefix=/nowhere/text"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught:
        sweep_lr.main()
    assert caught.value.code == 1
    assert "config, width 64, lr 0.01, seed 1: failed with status 2" in capsys.readouterr().err


def finished(folder: Path, losses: list[Any], exit_code: int = 0) -> Path:
    """A run directory as training leaves it."""
    folder.mkdir()
    state = "completed" if exit_code == 0 else "failed"
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 1, "exit_code": exit_code}))
    rows = [json.dumps({"step": i + 1, "train/loss": loss}) + "\n" for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


def test_what_counts_as_diverged(tmp_path: Path) -> None:
    falling = [5.0 - i / 10 for i in range(20)]
    good = sweep_lr.measure(finished(tmp_path / "good", falling))
    assert good is not None
    assert good.pop("loss") == pytest.approx((3.2 + 3.1) / 2), "the last two of twenty"
    assert good == {"initial_loss": 5.0, "valid_loss": None, "diverged": ""}
    for name, losses, code, why in (
        ("nan", [5.0, 4.0, "nan"], 0, "loss not finite"),
        ("up", [5.0, 4.0, 5.1], 0, "loss above that of the first step"),
        ("skipped", [5.0, "inf"], 3, "gradients stayed non-finite"),
    ):
        found = sweep_lr.measure(finished(tmp_path / name, losses, code))
        assert found is not None
        assert found["diverged"] == why
        assert sweep_lr.chosen(found, "train") == math.inf
        json.dumps(found, allow_nan=False)
    assert sweep_lr.measure(tmp_path / "absent") is None
    assert sweep_lr.measure(finished(tmp_path / "bug", falling, 1)) is None
    (tmp_path / "good" / "status.json").write_text('{"state": "stopped", "step": 9, "exit_code": 0}')
    assert sweep_lr.measure(tmp_path / "good") is None, "stopped on request: not at its end"


def planned(config: Path, **changes: Any) -> list[sweep_jobs.Job]:
    arms = changes.pop("arms", [("config", ())])
    lrs = changes.pop("lrs", (0.01,))
    settings = {"widths": [64], "seeds": [1], "steps": 5, "head_dim": None, "overrides": [], "loss": "train"}
    listed = [sweep_jobs.Arm(name, overrides, lrs) for name, overrides in arms]
    return sweep_jobs.plan(SimpleNamespace(config=config, arms=listed, **(settings | changes)))  # type: ignore[arg-type]


def test_results_are_reused_only_for_the_same_configuration(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    [job] = planned(config)
    results = sweep_lr.Results(tmp_path / "sweep.json")
    results.add(job, {"loss": 1.0, "diverged": ""}, 2.0)
    known = sweep_lr.Results(tmp_path / "sweep.json")
    assert known.get(planned(config)[0]) is not None
    for change in ({"steps": 6}, {"lrs": (0.02,)}, {"seeds": [2]}, {"overrides": ["optimizer.beta2=0.9"]}):
        assert known.get(planned(config, **change)[0]) is None, change
    assert known.get(planned(config, arms=[("other", ())])[0]) is None
    with pytest.raises(UserError, match=r"optimizer\.lr is set by --lrs"):
        planned(config, overrides=["optimizer.lr=1"])
    with pytest.raises(UserError, match=r"model\.hidden_size is set by --widths"):
        planned(config, arms=[("wide", ("model={hidden_size: 128}",))])


def test_widths(tmp_path: Path) -> None:
    config = write_config(tmp_path)  # 4 heads of 16, 2 for keys; MLP 256

    def model_of(width: int, **changes: Any) -> Any:
        [job] = planned(config, widths=[width], **changes)
        return load_config(config, job.overrides).config.model

    model = model_of(96)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_hidden_size) == (6, 3, 16, 384)
    model = model_of(96, overrides=["model.ffn_hidden_size=172"])
    assert model.ffn_hidden_size == 256, "2.6875 · 96 = 258"
    assert model_of(256, arms=[("scaled", ("model.init_std={width^-0.5}",))]).init_std == 1 / 16
    assert model_of(96, overrides=["model.vocab_size={width}"]).vocab_size == 96
    assert model_of(32, head_dim=8).num_heads == 4
    with pytest.raises(UserError, match="--widths 72: not a whole number of heads of 16"):
        model_of(72)
    with pytest.raises(UserError, match=r"--widths 16: its 1 heads cannot share keys .* --head-dim"):
        model_of(16)


def test_words() -> None:
    assert [sweep_jobs.parse_lr(text) for text in ("2^-10", "2^-0.5", "3e-4")] == [2**-10, 2**-0.5, 3e-4]
    assert [format_lr(lr) for lr in (2**-10, 2**-0.5, 3e-4, 1.0)] == ["2^-10", "2^-0.5", "0.0003", "2^0"]
    assert sweep_jobs.parse_arm("a") == ("a", ())
    assert sweep_jobs.parse_arm("a: x.y=1 z=[1,2]") == ("a", ("x.y=1", "z=[1,2]"))
    assert sweep_jobs.parse_arm("mus:precision.recipe=mus") == ("mus", ("precision.recipe=mus",))
    for text in ("2^", "zero", "-1", "0", "inf", "2^9999"):
        with pytest.raises(Exception, match="is no learning rate"):
            sweep_jobs.parse_lr(text)


@pytest.mark.parametrize(("center", "curvature"), [(-9.3, 0.2), (-7.0, 1.5), (-5.6, 0.01)])
def test_the_optimum_of_a_parabola(center: float, curvature: float) -> None:
    losses = {2.0**k: 3 + curvature * (k - center) ** 2 for k in range(-12, -3)}
    best = find_optimum(losses)
    assert best is not None
    assert best.kind == "parabola"
    assert math.log2(best.lr) == pytest.approx(center, abs=1e-9)
    assert best.loss == pytest.approx(3, abs=1e-9)
    assert best.grid_lr == 2.0 ** round(center)
    uneven = {2.0**k: 3 + curvature * (k - center) ** 2 for k in (-12, -10, -9.5, -6.5, -5, -4.5, -3)}
    best = find_optimum(uneven)
    assert best is not None
    assert math.log2(best.lr) == pytest.approx(center, abs=1e-9)


def test_optima_that_no_parabola_gives() -> None:
    inf = math.inf
    assert find_optimum({0.1: inf, 0.2: inf}) is None
    assert find_optimum({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}) == Optimum(4.0, 1.0, 4.0, 1.0, "edge")
    assert find_optimum({1.0: 3.0, 2.0: 2.0, 4.0: inf}) == Optimum(2.0, 2.0, 2.0, 2.0, "grid")
    # This parabola's vertex, 2^2.5, lies towards a run that diverged.
    assert find_optimum({1.0: 3.0, 2.0: 2.0, 4.0: 1.5, 8.0: inf}) == Optimum(4.0, 1.5, 4.0, 1.5, "grid")
    # The three best, 2^0 to 2^2, fall ever faster: their parabola opens downwards.
    assert find_optimum({1.0: 3.0, 2.0: 2.5, 4.0: 1.0, 8.0: inf}) == Optimum(4.0, 1.0, 4.0, 1.0, "grid")


def test_slope_of_the_optimum() -> None:
    def best(lr: float) -> Optimum:
        return Optimum(lr, 1.0, lr, 1.0, "grid")

    assert transfer_slope({64: best(0.4), 128: best(0.2), 512: best(0.05)}) == pytest.approx(-1)
    assert transfer_slope({64: best(0.4), 128: best(0.4)}) == pytest.approx(0, abs=1e-12)
    assert transfer_slope({64: best(0.4), 128: None}) is None


def test_table_and_plot(tmp_path: Path) -> None:
    curves = {
        width: {2.0**k: 3 + (k + 8 - math.log2(width / 64)) ** 2 / 8 for k in (-10, -8, -6)}
        for width in (64, 128)
    }
    curves[128][2.0**-4] = math.inf
    swept = {"one": curves, "two": {64: {2.0**-8: 2.5}}}
    rows = [line.split("|")[1:-1] for line in sweep_table(swept).splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["width", "2^-10", "2^-8", "2^-6", "2^-4", "best on the grid", "best, parabola"]
    assert cells[2] == ["64", "3.5000", "**3.0000**", "3.5000", "", "2^-8", "2^-8.00 (3.0000)"]
    assert cells[3] == ["128", "4.1250", "**3.1250**", "3.1250", "diverged", "2^-8", "2^-7.00 (3.0000)"]
    assert cells[-1] == ["64", "**2.5000**", "2^-8", "edge of the grid"]
    assert "slope of log2(best lr) over log2(width): +1.00" in sweep_table(swept)
    assert "not to be trusted" not in sweep_table(swept)
    edge = {"one": {64: {1.0: 2.0, 2.0: 3.0}, 128: {1.0: 2.0, 2.0: 3.0}}}
    assert "width): +0.00 (not to be trusted: 2 of 2 optima at the edge of the grid)" in sweep_table(edge)
    plot_sweep(swept, tmp_path / "plot.png", title="t", loss="loss")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
