"""``tools/cscale_window.py`` on trained checkpoints, against casts written out here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.cli import run_command
from tests.training.launching import finish, start, write_config
from tools.cscale_report import Window, find_window
from tools.cscale_window import Evaluator, constant_quant, main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in BF16, and one with delayed scales and resident FP8 weights of which a layer is left out."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder)
    common = ["train.steps=20", "train.eval_interval=20", "checkpoint.interval=0", "optimizer.lr=0.02"]
    common += ["train.micro_batch_size=8", "train.eval_batches=1"]
    bf16 = start(config, 1, *common, "run.name=bf16")
    fp8 = ["precision.level=O2", "precision.recipe=te_delayed", "precision.gemm.first_layers_bf16=1"]
    delayed = start(config, 1, *common, "run.name=delayed", *fp8)
    finish(bf16)
    finish(delayed)
    return folder


def tool(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the tool in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["cscale_window.py", *words, "--threads", "1"])
    try:
        main()
    except SystemExit as error:
        return int(str(error.code))
    return 0


def trained_loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [float(row["eval/loss"]) for row in rows if "eval/loss" in row][-1]


def through_fp8(x: Tensor, exponent: int | None) -> Tensor:
    """What E4M3 keeps of x under the scale 2^exponent, in x's dtype (which holds it exactly). None: the
    largest power of two under which nothing saturates."""
    if exponent is None:
        exponent = math.floor(math.log2(448 / x.abs().max().item()))
    scaled = (x.float() * 2.0**exponent).clamp(-448, 448)
    return (scaled.to(torch.float8_e4m3fn).float() * 2.0**-exponent).to(x.dtype)


@torch.no_grad()
def simulated_loss(run: Path, exponent: int, operands: str) -> float:
    """The loss in BF16 with rounded weights and rounded inputs of the linears."""
    x, w = (exponent if operands in ("both", operand) else None for operand in ("x", "w"))
    evaluator = Evaluator(run, device=CPU, data=None, batches=None)
    for linear in evaluator.linears.values():
        linear.weight.copy_(through_fp8(linear.weight, w))
        linear.register_forward_pre_hook(lambda module, args: (through_fp8(args[0], x),))
    return evaluator.loss(None)


@pytest.mark.slow
def test_the_whole_tool(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "bf16"
    assert tool(monkeypatch, str(run), "--exponents", "-8", "15", "--operands", "both", "w") == 0
    result: dict[str, Any] = json.loads((run / "report/cscale.json").read_text())
    assert (result["tokens"], result["step"]) == (8 * 32, 20)
    reference = trained_loss(run)
    assert result["high_precision"] == pytest.approx(reference, rel=1e-12), "the weights training ended with"
    assert result["amax"] == pytest.approx(reference, rel=2e-3)
    printed = capsys.readouterr().out
    for operands in ("both", "w"):
        losses = {int(k): v for k, v in result["sweeps"][operands]["losses"].items()}
        assert list(losses) == list(range(-8, 16))
        low, high = result["sweeps"][operands]["window"]
        assert all(losses[k] <= 1.005 * reference for k in range(low, high + 1))
        assert losses[low - 1] > 1.005 * reference
        assert f"window for {operands}, at most 0.5% above {reference:.4f}: k = {low} .. {high}," in printed
    both, w = (result["sweeps"][operands]["window"] for operands in ("both", "w"))
    assert both[1] < w[1], "activations are larger than weights and saturate first"
    assert (run / "report/cscale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("exponent", "operands"), [(-5, "both"), (15, "both"), (15, "x"), (-5, "w")])
def test_losses_are_those_of_casts_written_out(folder: Path, exponent: int, operands: str) -> None:
    evaluator = Evaluator(folder / "bf16", device=CPU, data=None, batches=None)
    found, plain = evaluator.loss(constant_quant(exponent, operands)), evaluator.loss(None)
    expected = simulated_loss(folder / "bf16", exponent, operands)
    assert abs(expected - plain) > 0.01 * plain, "this exponent should hurt, or nothing is compared"
    assert found == pytest.approx(expected, rel=5e-4)


def test_only_linears_that_were_trained_in_fp8_are_swept(folder: Path) -> None:
    evaluator = Evaluator(folder / "delayed", device=CPU, data=None, batches=1)
    assert sorted(evaluator.linears) == [
        f"layers.1.{n}" for n in ("attention.out", "attention.qkv", "mlp.down", "mlp.up")
    ]
    assert evaluator.loss(None) == pytest.approx(trained_loss(folder / "delayed"), rel=0.05)
    assert evaluator.loss(constant_quant(30, "both")) > 1.01 * evaluator.loss(None)


def test_inference_casts_are_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without FP8 gets the scales that inference would use, from amax of weights read here."""
    run = folder / "bf16"
    assert tool(monkeypatch, str(run), "--exponents", "0", "0") == 0
    assert run_command(["report", "scales", str(run)]) == 0
    assert "inference: 2 layers, step 20" in capsys.readouterr().out
    result = json.loads((run / "report/scales.json").read_text())
    linears = Evaluator(run, device=CPU, data=None, batches=None).linears
    for kind in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"):
        amaxes = [float(linears[f"layers.{i}.{kind}"].weight.detach().abs().max()) for i in range(2)]
        scales = sorted(math.floor(math.log2(448 / amax)) for amax in amaxes)
        [entry] = [
            s
            for s in result["inference"]["series"]
            if (s["operand"], s["linear"]) == ("w", kind.split(".")[1])
        ]
        assert (entry["log2_scale"]["all"]["min"], entry["log2_scale"]["all"]["max"]) == tuple(scales)
    assert {s["operand"] for s in result["inference"]["series"]} == {"x", "w"}


def test_mistakes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        ([str(tmp_path)], "holds no checkpoint"),
        ([str(folder / "bf16"), "--exponents", "4", "-4"], "give LOW <= HIGH"),
        ([str(folder / "bf16"), "--batches", "0"], "give 1 or more"),
        ([str(folder / "bf16"), "--data", str(tmp_path / "gone")], "gone.bin"),
    ):
        assert tool(monkeypatch, *words) == 2
        assert message in capsys.readouterr().err


def test_window() -> None:
    losses = {-3: 2.0, -2: 1.004, -1: 1.0, 0: 1.006, 1: 1.005, 2: 0.9, 3: 1.0, 4: math.nan, 5: 1.0}
    assert find_window(losses, 1.0, 0.005) == Window(1, 3, open_end=False)
    assert find_window(losses, 1.0, 0.01) == Window(-2, 3, open_end=False)
    assert find_window({0: 1.0, 1: 1.0, 2: 2.0}, 1.0, 0.005) == Window(0, 1, open_end=True)
    assert find_window({0: 1.1, 1: math.nan, 2: math.inf}, 1.0, 0.005) is None
