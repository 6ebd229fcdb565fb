"""``fp8train report scales`` on a run started as a user would, held against the lines of its log."""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fp8train.cli import run_command
from tests.training.launching import finish, start, write_config

LAYERS, KINDS = 3, ("qkv", "out", "up", "down")
PLOTS = ("scales_by_layer.png", "scales_distribution.png", "scales_over_steps.png", "flushed_saturated.png")
SITE = {"qkv": "attention.qkv", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}


SAVE = Figure.savefig


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering takes seconds; :func:`drawn` does it, for the test of the plots."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: Path(path).touch())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three layers and seven steps: ``o2``, sampled every second step, and ``bf16``."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder)
    common = ["model.num_layers=3", "train.steps=7", "train.eval_interval=0", "checkpoint.interval=0"]
    o2 = start(config, 1, *common, "run.name=o2", "precision.level=O2", "logging.cast_statistics_interval=2")
    bf16 = start(config, 1, *common, "run.name=bf16")
    finish(o2)
    finish(bf16)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the FP8 run that the test may change."""
    return Path(shutil.copytree(folder / "o2", tmp_path / "o2"))


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "casts.jsonl").read_text().splitlines()]


def report(run: Path, *options: str) -> dict[str, Any]:
    assert run_command(["report", "scales", str(run), *options]) == 0
    result: dict[str, Any] = json.loads((run / "report" / "scales.json").read_text())
    return result


def entry(result: dict[str, Any], operand: str, linear: str, log: str = "training") -> dict[str, Any]:
    [found] = [s for s in result[log]["series"] if (s["operand"], s["linear"]) == (operand, linear)]
    return found


def test_numbers_are_those_of_the_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, result = log_of(run), report(run)
    assert {row["step"] for row in rows} == {1, 2, 4, 6}
    assert result["training"]["moments"] == {"start": 1, "middle": 4, "end": 6}
    assert len(result["training"]["series"]) == 4 * len(KINDS)
    table = capsys.readouterr().out
    assert "o2: completed at step 7" in table
    assert "3 layers, 4 sampled steps, 1 to 6" in table
    for operand in ("x", "w", "grad_output", "grad_weight"):
        for kind in KINDS:
            mine = [r for r in rows if r["site"].endswith(f".{kind}/{operand}")]
            assert len(mine) == 4 * LAYERS
            found = entry(result, operand, kind)
            cells = []
            for moment, step in (("start", 1), ("middle", 4), ("end", 6)):
                scales = sorted(r["log2_scale"] for r in mine if r["step"] == step)
                assert found["log2_scale"][moment] == {
                    "min": scales[0], "median": scales[1], "max": scales[2]
                }  # fmt: skip
                cells.append("/".join(f"{round(scale, 1):g}" for scale in scales))
            for share in ("flushed", "saturated"):
                worst = max(mine, key=lambda r: r[share])
                assert found[share]["mean"] == pytest.approx(statistics.fmean(r[share] for r in mine))
                assert found[share]["worst"] == worst[share]
            [line] = [s for s in table.splitlines() if s.split()[:2] == [operand, kind]]
            assert line.split()[2:5] == cells
            assert line.split()[5] == f"{100 * statistics.fmean(r['flushed'] for r in mine):.3g}"
    flushed = [entry(result, "x", kind)["flushed"]["worst"] for kind in KINDS]
    assert max(flushed) > 0, "a comparison of zeros shows nothing"


def test_csv_holds_every_line_of_the_log(run: Path) -> None:
    report(run)
    with (run / "report" / "scales.csv").open() as file:
        found = {
            (int(r["step"]), f"layers.{r['layer']}.{SITE[r['linear']]}/{r['operand']}"): r
            for r in csv.DictReader(file)
        }
    rows = log_of(run)
    assert len(found) == len(rows) == 4 * LAYERS * 16
    for row in rows:
        for field in ("log2_scale", "flushed", "saturated", "amax", "rms", "snr_db"):
            assert float(found[row["step"], row["site"]][field]) == float(row[field])


def drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures of a report, as they are saved."""
    figures: dict[str, Figure] = {}

    def keep(self: Figure, path: Path, **options: Any) -> None:
        figures[Path(path).name] = self
        SAVE(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    report(run)
    return figures


def test_plots_show_the_log(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, rows = drawn(run, monkeypatch), log_of(run)
    assert set(figures) == set(PLOTS)
    scale = {(r["step"], r["site"]): r["log2_scale"] for r in rows}
    operands = ("x", "w", "grad_output", "grad_weight")
    by_layer, over_steps = (np.array(figures[name].axes[:16]).reshape(4, 4) for name in (PLOTS[0], PLOTS[2]))
    for i, operand in enumerate(operands):
        for j, kind in enumerate(KINDS):
            sites = [f"layers.{layer}.{SITE[kind]}/{operand}" for layer in range(LAYERS)]
            lines = [list(line.get_ydata()) for line in by_layer[i, j].lines]
            assert lines == [[scale[step, site] for site in sites] for step in (1, 4, 6)]
            lines = [list(line.get_ydata()) for line in over_steps[i, j].lines]
            assert lines == [[scale[step, site] for step in (1, 2, 4, 6)] for site in sites]
    shares = defaultdict(list)
    for row in rows:
        if row["site"].endswith(".down/x"):
            shares[row["step"]].append(100 * row["flushed"])
    panel = figures["flushed_saturated.png"].axes[0]
    mean, worst = panel.lines[2 * KINDS.index("down") :][:2]
    assert list(mean.get_ydata()) == pytest.approx([statistics.fmean(s) for s in shares.values()])
    assert list(worst.get_ydata()) == pytest.approx([max(s) for s in shares.values()])
    for name in PLOTS:
        assert (run / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_the_later_part_of_a_resumed_log_wins(run: Path) -> None:
    """The job went back to step 3 and sampled other steps from there."""
    rows = log_of(run)
    again = [{**r, "step": {4: 3, 6: 5}[r["step"]], "log2_scale": -9.0} for r in rows if r["step"] >= 4]
    with (run / "casts.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in again)
    result = report(run)
    assert result["training"]["moments"] == {"start": 1, "middle": 3, "end": 5}
    for kind in KINDS:
        found = entry(result, "w", kind)
        assert found["samples"] == 4 * LAYERS
        assert found["log2_scale"]["end"] == {"min": -9.0, "median": -9.0, "max": -9.0}
        first = [r["log2_scale"] for r in rows if r["step"] == 1 and r["site"].endswith(f".{kind}/w")]
        assert found["log2_scale"]["start"]["max"] == max(first)


def test_a_repeated_step_counts_once(run: Path) -> None:
    rows = log_of(run)
    with (run / "casts.jsonl").open("a") as file:
        file.writelines(json.dumps({**r, "flushed": 0.5}) + "\n" for r in rows if r["step"] == 6)
    found = entry(report(run), "x", "qkv")
    assert found["samples"] == 4 * LAYERS
    assert (found["flushed"]["worst"], found["flushed"]["worst_step"]) == (0.5, 6)


def test_an_unfinished_run_with_a_torn_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, status = run / "casts.jsonl", json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running", "step": 0}))
    log.write_bytes(log.read_bytes()[:-40])
    result = report(run)
    out = capsys.readouterr().out
    assert f"{run}: running\n" in out
    assert "note: casts.jsonl: 1 unreadable line left out" in out
    assert entry(result, "grad_weight", "down")["samples"] == 4 * LAYERS - 1


def test_casts_that_were_not_finite_are_counted_and_left_out(run: Path) -> None:
    rows = log_of(run)
    broken = f"layers.1.{SITE['up']}/grad_output"
    for row in rows:
        if row["site"] == broken and row["step"] == 6:
            row |= {"amax": "nan", "log2_scale": "nan", "snr_db": "nan"}
    (run / "casts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = entry(report(run), "grad_output", "up")
    assert (found["not_finite"], found["samples"]) == (1, 4 * LAYERS)
    rest = [r["log2_scale"] for r in rows if r["step"] == 6 and r["site"].endswith(".up/grad_output")]
    rest.remove("nan")
    assert found["log2_scale"]["end"]["min"] == min(rest)
    assert not math.isnan(found["log2_scale"]["all"]["median"])


def test_a_scale_of_one_has_no_sign(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | ({"log2_scale": -0.0} if row["site"].endswith("/w") else {}) for row in log_of(run)]
    (run / "casts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(run)
    [line] = [s for s in capsys.readouterr().out.splitlines() if s.split()[:2] == ["w", "up"]]
    assert line.split()[2:5] == ["0/0/0"] * 3


def test_an_inference_log_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(folder / "bf16", tmp_path / "bf16"))
    rows = [r for r in log_of(folder / "o2") if r["step"] == 6 and r["site"][-2:] in ("/x", "/w")]
    (run / "inference_casts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = report(run, "--out", str(run / "report"))
    assert "inference: 3 layers, step 6" in capsys.readouterr().out
    assert "training" not in result
    scales = sorted(r["log2_scale"] for r in rows if r["site"].endswith(".down/w"))
    assert entry(result, "w", "down", "inference")["log2_scale"]["start"]["median"] == scales[1]
    assert sorted(p.name for p in (run / "report").glob("*.png")) == ["scales_inference.png"]


def message(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run_command(["report", "scales", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_what_cannot_be_reported(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing: no such directory" in message(capsys, str(run / "nothing"))
    assert "is not a run directory (no status.json)" in message(capsys, str(run / "logs"))
    without = message(capsys, str(folder / "bf16"))
    assert "trained without FP8 (precision.gemm.fp8: false)" in without
    assert "tools/cscale_window.py" in without
    (run / "casts.jsonl").unlink()
    assert "no cast statistics yet (completed at step 7)" in message(capsys, str(run))
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("cast_statistics_interval: 2", "cast_statistics_interval: 0")
    )
    assert "logging.cast_statistics_interval: 0" in message(capsys, str(run))
    (run / "status.json").write_text("{}")
    assert "status.json is damaged" in message(capsys, str(run))


def test_a_run_too_short_for_its_interval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    long = config.read_text().replace("cast_statistics_interval: 2", "cast_statistics_interval: 50")
    config.write_text(long)
    rows = [row for row in log_of(run) if row["step"] == 1]  # the only step that is sampled whatever happens
    (run / "casts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    advice = (
        "logging.cast_statistics_interval is 50, more than the 7 steps of the run; train with "
        "logging.cast_statistics_interval=1\n"
    )
    report(run)
    assert f"note: casts.jsonl: one step was sampled; {advice}" in capsys.readouterr().out
    (run / "casts.jsonl").unlink()
    assert message(capsys, str(run)).endswith(f"holds no cast statistics yet (completed at step 7); {advice}")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert message(capsys, str(run)).endswith("the first are written after the first step\n")


def test_a_folder_that_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "file").write_text("")
    assert run_command(["report", "scales", str(run), "--out", str(run / "file")]) == 2
    assert "choose a folder with --out" in capsys.readouterr().err
