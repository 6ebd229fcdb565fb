"""``tools/bench/gpu_all.sh`` in miniature on a CPU: what it writes, how it goes on, how it fails."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # processes that import torch, one after the other
PARTS = ("tests", "kernels", "gemm", "step_8b", "profile", "optimizer", "step_1b", "step_3b", "linear")


def gpu_all(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "tools/bench/gpu_all.sh"), "--tiny", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850, check=False)


def read(out: Path, part: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / f"{part}.json").read_text())
    return result


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by their own names."""
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))


@pytest.mark.slow
def test_everything_in_miniature(tmp_path: Path) -> None:
    out, pack = tmp_path / "out", tmp_path / "all.tar.gz"
    done = gpu_all(out, "--pack", str(pack))
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        result = read(out, part)
        assert result["complete"] is True, part
        machine = result["machine"]
        assert machine["device"] == "cpu"
        assert machine["torch"] == torch.__version__
        assert machine["triton"]
        assert machine["command"][0] == "python"
    assert {row["outcome"] for row in read(out, "tests")["rows"]} <= {"skipped", "passed"}
    kernels = {row["case"]: row for row in read(out, "kernels")["rows"]}
    assert kernels["cast_operand[x]"]["small"]["same_bits"] is True
    assert 0 < kernels["residual_norm[rms, amax]"]["small"]["error_fp64"] < 4e-3  # rounded to BF16
    assert all(row["training_fp8"] > 0 for row in read(out, "gemm")["rows"])
    step = read(out, "step_8b")
    assert [entry["variant"] for entry in step["variants"]] == ["O0", "O2"] * 2
    assert {block["variant"] for block in step["blocks"]} == {"O0", "O2"}
    assert read(out, "profile")["summary"]["launches"] > 100
    assert "kernel" in (out / "profile.txt").read_text()
    assert read(out, "optimizer")["plans"]["O2"]["share_of_copy"] > 0
    assert "ok" in done.stdout
    with tarfile.open(pack) as packed:
        assert {f"./{part}.json" for part in PARTS} <= set(packed.getnames())


@pytest.mark.slow
def test_a_complete_part_is_skipped_and_others_do_not_stop_for_one_that_fails(tmp_path: Path) -> None:
    (tmp_path / "linear.json").mkdir()  # a result that cannot be written
    done = gpu_all(tmp_path, "--only", "linear gemm")
    assert done.returncode == 1
    assert "linear  no result" in done.stdout
    assert read(tmp_path, "gemm")["complete"] is True
    written = (tmp_path / "gemm.json").stat().st_mtime_ns
    (tmp_path / "linear.json").rmdir()
    done = gpu_all(tmp_path, "--only", "linear gemm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gemm: complete already" in done.stdout
    assert (tmp_path / "gemm.json").stat().st_mtime_ns == written
    assert gpu_all(tmp_path, "--only", "gemm", "--again").returncode == 0
    assert (tmp_path / "gemm.json").stat().st_mtime_ns > written


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped_and_runs_again(tmp_path: Path) -> None:
    done = gpu_all(tmp_path, "--only", "gemm", "--limit", "gemm=1")
    assert done.returncode == 1
    assert "gemm: stopped at its limit of 1 s" in done.stdout
    assert "no result" in done.stdout or "incomplete" in done.stdout
    done = gpu_all(tmp_path, "--only", "gemm")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_noted_failure_is_still_one_when_the_part_is_skipped(tmp_path: Path) -> None:
    failed = {"complete": True, "failures": ["cast_operand[x]: 1 % of the results differ"], "rows": []}
    (tmp_path / "kernels.json").write_text(json.dumps(failed))
    done = gpu_all(tmp_path, "--only", "kernels")
    assert done.returncode == 1
    assert "ok, 1 failed" in done.stdout
    assert "cast_operand[x]: 1 % of the results differ" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "gem"), "--only: no part gem"),
        (("--limit", "gemm"), "--limit gemm: expected PART=SECONDS"),
        (("--limit", "gem=3"), "--limit gem=3: no such part"),
        (("--out",), "--out needs a value"),
        (("--fast",), "unknown argument --fast"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = gpu_all(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_predictions_stand_beside_what_is_measured(tmp_path: Path) -> None:
    done = gpu_all(tmp_path, "--only", "predict step_1b")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = sorted(
        (entry for entry in read(tmp_path, "step_1b")["variants"] if entry["variant"] == "O2"),
        key=lambda entry: entry["layers"],
    )
    assert 0 < one["predicted"]["launches"] < two["predicted"]["launches"]
    assert one["predicted"]["optimizer_seconds"] < one["predicted"]["seconds"]


@pytest.mark.usefixtures("bench")
def test_one_trainer_is_alive_at_a_time() -> None:
    from step_arguments import Point, argument_parser, finish_arguments, make_config
    from train_step import built, measure

    from fp8train.step.trainer import Trainer

    old, sys.argv = sys.argv, ["train_step.py", "--tiny", "--device", "cpu"]
    try:
        args = finish_arguments(argument_parser(None))
    finally:
        sys.argv = old
    others = [thing for thing in gc.get_objects() if isinstance(thing, Trainer)]  # of other tests

    def alive() -> int:
        return sum(isinstance(thing, Trainer) for thing in gc.get_objects()) - len(others)

    for name in args.chosen:
        point = Point(1, 1, 32)
        with built(make_config(args, name, point), 64, torch.device("cpu")) as one:
            assert alive() == 1
            assert measure(args, one, point)["seconds"][0] > 0
        del one
        assert alive() == 0


@pytest.mark.usefixtures("bench")
def test_results_are_compared_by_bits_errors_and_amax() -> None:
    from kernels import difference, same_bits

    x = torch.tensor([1.0, -0.0, float("nan")])
    assert same_bits(x, x.clone())
    assert not same_bits(x, torch.tensor([1.0, 0.0, float("nan")]))
    same, worst, share = difference([x[:2] + 1], [torch.tensor([2.0, 2.0])])
    assert not same
    assert worst == pytest.approx(1 / 8**0.5 / 1e-5, rel=1e-6)
    assert share == 0.5
    # partials: as many as programs; their largest magnitude counts
    assert difference([torch.tensor([-3.0, 1.0])], [torch.tensor([3.0])])[0]
    assert difference([torch.full((2,), float("nan"))], [torch.ones(2)])[1] > 1e100


@pytest.mark.usefixtures("bench")
def test_the_smallest_size_that_wins_needs_all_larger_ones_to_win() -> None:
    from gemm import crossover

    def row(k: int, n: int, ratio: float) -> dict[str, Any]:
        return {"k": k, "n": n, "training_bf16": ratio, "training_fp8": 1.0}

    rows = [row(256, 256, 1.1), row(512, 8192, 0.9), row(1024, 1024, 1.2), row(2048, 1024, 1.3)]
    assert crossover(rows) == 1024
    assert crossover([*rows, row(4096, 4096, 0.8)]) is None


def test_smaller_cases_agree_in_their_sizes() -> None:
    from fp8train.kernels.fused_op import OPERATIONS
    from tools.kernel_cases import cases

    wanted = ("split_heads", "rotate_heads", "heads_grad_forward", "norm_forward")
    for case in cases():
        if case.operation in wanted:
            arguments = case.filled(torch.device("cpu"), scale=1024)
            OPERATIONS[f"fp8train::{case.operation}"].reference(*arguments)
            for ours, full in zip(arguments, case.arguments, strict=True):
                if isinstance(full, torch.Tensor):
                    order = sorted(range(full.dim()), key=full.stride, reverse=True)
                    assert ours.permute(order).is_contiguous(), f"{case}: strides {ours.stride()}"


def test_optimizer_cases_have_values() -> None:
    from tools.kernel_cases import cases

    for case in cases():
        if case.operation == "optimizer_update":
            gradients, _, masters, _, *moments = case.filled(torch.device("cpu"), scale=64)[:8]
            for tensor in (*gradients, *masters, *moments[0], *moments[2]):
                assert tensor.float().count_nonzero() > tensor.numel() / 2, case


@pytest.mark.usefixtures("bench")
def test_copies_of_arguments_are_found_by_their_addresses() -> None:
    from kernels import copied

    x, y = torch.ones(3), torch.zeros(2)
    table = torch.tensor([[x.data_ptr(), 7], [y.data_ptr(), x.data_ptr()]])
    (first, second), addresses, name = copied(([x, y], table, "name"))
    assert name == "name" and torch.equal(first, x) and first.data_ptr() != x.data_ptr()
    assert addresses.tolist() == [[first.data_ptr(), 7], [second.data_ptr(), first.data_ptr()]]
    assert table[0, 0] == x.data_ptr()
