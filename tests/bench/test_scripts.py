"""The benchmark scripts run in miniature and write what they promise. Timings are not asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "bench" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=False)


def result_of(script: str, path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    done = run(script, *arguments, "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def check_numbers(variant: dict[str, Any], measurements: int) -> None:
    assert len(variant["seconds_per_step"]) == measurements
    low, high = variant["ratio_range"]
    assert low <= variant["ratio_median"] <= high
    numbers = [value for value in variant.values() if isinstance(value, float)]
    numbers += [*variant["seconds_per_step"], low, high]
    assert all(math.isfinite(number) and number > 0 for number in numbers), variant


def check_machine(machine: dict[str, Any]) -> None:
    assert machine["device"] == "cpu"
    assert machine["threads"] == 1
    assert machine["torch"]
    assert machine["command"][0] == "python"
    assert machine["command"][1].endswith(".py")


def test_train_step(tmp_path: Path) -> None:
    options = ["--tiny", "--device", "cpu", "--threads", "1", "model.init_std=0.02"]
    result, table = result_of("train_step.py", tmp_path / "result.json", *options)
    check_machine(result["machine"])
    variants = {variant["variant"]: variant for variant in result["variants"]}
    assert list(variants) == ["O0", "FP8"]
    assert [(row["turn"], row["variant"]) for row in result["rows"]] == [
        (turn, name) for turn in (0, 1) for name in variants
    ]
    for variant in variants.values():
        check_numbers(variant, measurements=2)
        assert variant["mfu"] is None, "a CPU has no published peak"
        # 1.1M parameters: 4 bytes of gradient, 2 of weight, 12 of master and moments at the very least.
        assert 20e6 < variant["peak_bytes"] < 4e9
        assert variant["first_loss"] == pytest.approx(math.log(512), abs=0.3)
        assert variant["micro_batch_size"] * variant["seq_length"] == 128
        assert 0 < variant["optimizer_seconds"] < variant["seconds"]
    # 2 layers of hidden 192, 6 heads and 2 key/value heads of 32, MLP 512, and the head of 512 rows.
    flops = 6 * (2 * (192 * (192 + 128) + 192 * 192 + 3 * 192 * 512) + 192 * 512) + 6 * 2 * 192 * 64
    base = variants["O0"]
    assert base["tflops"] * 1e12 == pytest.approx(base["tokens_per_second"] * flops, rel=1e-12)
    assert base["ratio_median"] == base["memory_ratio"] == 1.0
    assert "O0" in table
    assert "FP8" in table


def test_train_step_says_what_is_wrong_with_a_configuration() -> None:
    done = run("train_step.py", "--tiny", "--device", "cpu", "model.num_kv_heads=4")
    assert done.returncode == 2
    assert "num_kv_heads" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_vs_peers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'fp8train[hf]'")
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv-heads": 2, "vocab": 256, "seq": 32, "batch": 2}
    sizes |= {"threads": 1, "pairs": 2, "steps": 4, "warmup": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    result, table = result_of("vs_peers.py", tmp_path / "result.json", *options, "--tie", "--cpu-time")
    check_machine(result["machine"])
    assert result["machine"]["transformers"]
    assert result["model"]["tokens_per_step"] == 64
    peers = [f"{peer} {mode}" for peer in ("transformers", "plain") for mode in ("FP32", "BF16")]
    ours = ["fp8train O0", "fp8train FP8", "fp8train O2"]
    assert list(result["variants"]) == peers + ours
    for peer, mode in result["compared_with"].items():
        assert mode in peers
        assert result["variants"][mode]["ratios"][peer]["median"] == 1
    for peer, bound in result["ratio_if_all_else_were_free"].items():
        share, ratio = result["share_in_shared_kernels"]["fp8train O0"], result["variants"]["fp8train O0"]
        assert 0 < share < 1
        assert bound * share == pytest.approx(ratio["ratios"][peer]["median"], rel=1e-12)
    # Equal weights, batches and optimizer: nine steps later the losses have fallen and are still equal.
    theirs = result["variants"]["transformers FP32"]
    assert theirs["last_loss"] < theirs["first_loss"] - 0.1
    for name, variant in result["variants"].items():
        assert name in table
        assert len(variant["seconds_per_step"]) == 2
        if name not in ("fp8train FP8", "fp8train O2"):
            assert variant["first_loss"] == pytest.approx(theirs["first_loss"], abs=0.01)
            assert variant["last_loss"] == pytest.approx(theirs["last_loss"], abs=0.005)


@pytest.mark.slow
def test_optimizer_step(tmp_path: Path) -> None:
    result, table = result_of("optimizer_step.py", tmp_path / "result.json", "--tiny")
    check_machine(result["machine"])
    plans = result["plans"]
    assert plans["FP32"]["stored_bytes_per_parameter"] == 12
    assert plans["O2"]["stored_bytes_per_parameter"] == pytest.approx(5 + 3 / 128, abs=1e-6)
    # A small matrix: temporaries are a dozen chunks at most, whatever the plan.
    for plan in plans.values():
        stored = plan["stored_bytes_per_parameter"] * result["parameters"]
        assert 0 < (plan["peak_over_stored"] - 1) * stored < 14 * 4 * 2**19
        assert plan["nanoseconds_per_parameter"] > 0
    assert "O2, v E4M3 expanded" in table


@pytest.mark.slow
def test_reduce_snr(tmp_path: Path) -> None:
    result, table = result_of("reduce_snr.py", tmp_path / "result.json", "--tiny")
    assert result["gloo"] == {"2": 3}
    snr = {(row["mode"], row["ranks"]): row["snr_db"] for row in result["results"]}
    for ranks in (2, 4):
        assert snr["exchange, all-reduce", ranks] >= 28
        assert snr["exchange, reduce-scatter", ranks] >= 31
        assert snr["BF16 ring", ranks] >= 45
    assert snr["hierarchical 2 + FP8", 4] >= 26
    assert "gloo, 2 ranks: 3 reductions have the bits of their simulation" in table


def test_wire_bytes(tmp_path: Path) -> None:
    result, _ = result_of("wire_bytes.py", tmp_path / "result.json", "--tiny")
    rows = {row["mode"]: row for row in result["results"]}
    assert rows["FP32 all-reduce"]["counted_bytes_per_parameter_and_rank"] == pytest.approx(4.0)
    assert rows["exchange, all-reduce"]["over_bf16_all_reduce"] <= 0.51
    assert rows["exchange, all-reduce"]["over_bf16_all_reduce"] / 2 <= 0.26
    for row in rows.values():  # a few MiB only, of which gloo's headers are a thousandth at most
        assert 1 <= row["sockets_over_counted"] <= 1.01, row


@pytest.mark.slow
def test_comm_volume(tmp_path: Path) -> None:
    result, table = result_of("comm_volume.py", tmp_path / "result.json", "--tiny")
    assert [(one["layout"], one["level"]) for one in result["results"]] == [
        ("tp 2", level) for level in ("O0", "O2", "O3")
    ]
    for one in result["results"]:
        rows = {row["traffic"]: row for row in one["rows"]}
        for row in rows.values():
            assert row["counted"] == pytest.approx(row["computed"], rel=0.01)
            assert row["largest_difference"] <= 0.01
        # 2 layers x 2 matrices, gathered twice: 4 micro-batches of 32 x 64 elements, half of which moves.
        codes = one["level"] == "O3"
        assert rows["all_gather/tp_input"]["counted"] == 4 * 2 * 4 * 32 * 64 * (1 if codes else 2) // 2
        assert 0 < one["small"] < 0.01 * one["total"]
    assert "small (amaxes, norms, loss)" in table


def test_comm_volume_of_a_configuration(tmp_path: Path) -> None:
    options = [str(ROOT / "configs" / "llama" / "llama3_8b.yaml"), "parallel.zero=1", "--dp", "2"]
    result, table = result_of("comm_volume.py", tmp_path / "result.json", *options)
    rows = {row["traffic"]: row["bytes"] for row in result["rows"]}
    # 8,030,261,248 parameters; half of their 2 bytes moves.
    assert rows["all_gather/weights"]["O0"] == 8_030_261_248
    assert rows["all_gather/weights_fp8_plan"]["O3"] == 6_979_321_856 / 2
    assert "dp 2 x pp 1 x cp 1 x tp 1, zero 1, 256 micro-batches" in table
    done = run("comm_volume.py", *options, "precision.gradient.format=e4m3")
    assert done.returncode == 2
    assert "precision.gradient.format" in done.stderr
    assert "Traceback" not in done.stderr


def test_checkpoint_io(tmp_path: Path) -> None:
    options = ["--tiny", "--threads", "1", "--dir", str(tmp_path)]
    result, table = result_of("checkpoint_io.py", tmp_path / "result.json", *options)
    check_machine(result["machine"])
    assert result["levels"]["O0"]["bytes"] == 12 * result["parameters"]
    assert result["levels"]["O2"]["bytes"] == result["parameters"] * (5 + 3 / 128)
    for level in result["levels"].values():
        assert level["host_bytes_of_asynchronous_saves"] == level["bytes"]
        for name, seconds in level["seconds"].items():
            assert len(seconds) == 2
            assert min(seconds) > 0, name
            assert name in table
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def test_fast_accumulation(tmp_path: Path) -> None:
    """The cast of E4M3 has 3 bits of mantissa: an error of up to 2^-4, about 0.026 in the mean of a product
    of two operands. Sums in 14 bits are far below it at small K, promoted ones below those."""
    options = ["--size", "16", "--depths", "256", "2048"]
    result, table = result_of("fast_accumulation.py", tmp_path / "result.json", *options)
    assert [(row["operands"], row["k"]) for row in result["rows"]] == [
        (kind, k) for kind in ("normal", "uniform") for k in (256, 2048)
    ]
    for row in result["rows"]:
        assert 0 < row["promoted"] <= row["fast"] < row["largest"]
        if row["operands"] == "normal":
            assert 0.02 < row["cast"] < 0.06
    assert "promoted" in table


@pytest.mark.slow
def test_guards_and_watchdog(tmp_path: Path) -> None:
    result, _ = result_of("guards_and_watchdog.py", tmp_path / "result.json", "--rounds", "2", "--steps", "1")
    check_machine(result["machine"])
    assert result["variants"]["nothing"]["ratio"] == 1.0
    low, high = result["variants"]["guards and watchdog"]["ratio_95"]
    assert 0 < low <= result["variants"]["guards and watchdog"]["ratio"] <= high
    assert all(0 < value < 1e5 for value in result["microseconds"].values())
