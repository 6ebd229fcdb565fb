"""Whole runs with ``engine: deepspeed`` at two gloo ranks, beside runs of our own engine: the same command,
data, log and checkpoints.

In FP32 losses are those of our engine but for the order of sums. In FP8 a cast is discontinuous: a value on
the other side of a threshold becomes another code, and DeepSpeed's blocks of gradients and states are cut
elsewhere. ``FP8_BOUND`` is what that may make of a loss within 40 steps at a high learning rate.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fp8train.checkpoint.catalog import candidates
from fp8train.cli import run_command
from tests.deepspeed_engine.two_ranks import needs_deepspeed
from tests.training.launching import finish, history, start, wait_for_step, weights, write_config

pytestmark = [*needs_deepspeed, pytest.mark.timeout(600)]

FP32_BOUND, FP8_BOUND = 1e-5, 0.08
FP32 = ("precision.compute=fp32",)
ZERO = {stage: ("engine=deepspeed", f"parallel.zero={stage}") for stage in (1, 2, 3)}
NVME = ("optimizer.offload=nvme", "deepspeed.offload_param=nvme")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def partitioned(config: Path) -> str:
    """ZeRO-3 leaves parameters of this size whole, unless it is told not to."""
    path = config.parent / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    return f"deepspeed.config={path}"


def run(config: Path, name: str, *overrides: str) -> Path:
    ranks = start(config, 2, f"run.name={name}", "checkpoint.interval=20", *overrides)
    finish(ranks, timeout_s=400)  # DeepSpeed may compile first
    return config.parent / name


def losses(directory: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def apart(ours: Path, other: Path) -> float:
    """The largest relative difference of the losses of a step."""
    first, second = losses(ours), losses(other)
    assert first.keys() == second.keys() and len(first) == 40
    assert all(math.isfinite(loss) for loss in second.values())
    return max(abs(first[step] - second[step]) / first[step] for step in first)


@pytest.fixture(scope="module")
def native(config: Path) -> Path:
    return run(config, "native", *FP32)


@pytest.fixture(scope="module")
def zero2(config: Path) -> Path:
    return run(config, "zero2", *FP32, *ZERO[2])


def continued(config: Path, source: Path, name: str, *overrides: str) -> Path:
    """The run ``source`` from its step 20 on, in a directory of its own."""
    directory = config.parent / name
    shutil.copytree(source, directory)
    shutil.rmtree(directory / "checkpoints" / "step_00000040")
    return run(config, name, "checkpoint.resume=auto", *overrides)


def test_fp32_losses_are_our_engines_and_resume_has_the_same_bits(
    config: Path, native: Path, zero2: Path
) -> None:
    """The smoke test: ZeRO-2, the one between."""
    assert apart(native, zero2) <= FP32_BOUND
    again = continued(config, zero2, "zero2_again", *FP32, *ZERO[2])
    assert history(again) == history(zero2)
    assert weights(again) == weights(zero2)


def test_export_and_evaluation_read_its_checkpoints(
    config: Path, native: Path, zero2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without DeepSpeed: a checkpoint is the same whoever wrote it."""
    found = []
    for directory in (native, zero2):
        file = config.parent / f"{directory.name}.safetensors"
        assert run_command(["export", "states", str(directory), "--output", str(file)]) == 0
        found.append(load_file(file))
    ours, theirs = found
    assert ours.keys() == theirs.keys() and any(name.startswith("exp_avg_sq") for name in ours)
    for name, tensor in ours.items():
        bound = 1e-4 * float(tensor.abs().max())  # 40 steps at a rate of 0.01
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=bound, msg=name)
    capsys.readouterr()
    assert run_command(["eval", str(zero2), "--batches", "2"]) == 0
    logged = [json.loads(line) for line in (zero2 / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"loss {logged['eval/loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("zero1", ZERO[1]),
        ("zero3", ZERO[3]),
        ("zero3_cut", (*ZERO[3], "PARTITIONED")),
        ("offload1", (*ZERO[1], "optimizer.offload=cpu")),
        ("offload2", (*ZERO[2], "optimizer.offload=cpu")),
        ("offload3", (*ZERO[3], "optimizer.offload=cpu", "deepspeed.offload_param=cpu", "PARTITIONED")),
        ("nvme3", (*ZERO[3], *NVME)),
    ],
)
def test_every_stage_and_offload(
    config: Path, native: Path, partitioned: str, name: str, overrides: tuple[str, ...]
) -> None:
    more = [partitioned if one == "PARTITIONED" else one for one in overrides]
    if "nvme" in name:
        pytest.importorskip("deepspeed")
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible():
            pytest.skip("needs libaio: apt-get install libaio-dev")
        more.append(f"deepspeed.nvme_path={config.parent / 'nvme'}")
        (config.parent / "nvme").mkdir(exist_ok=True)
    directory = run(config, name, *FP32, *more)
    assert apart(native, directory) <= FP32_BOUND
    if "nvme" not in name:
        again = continued(config, directory, f"{name}_again", *FP32, *more)
        assert history(again) == history(directory)
        assert weights(again) == weights(directory)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_with_the_other_engine(
    config: Path, native: Path, zero2: Path, partitioned: str, stage: int
) -> None:
    more = (*ZERO[stage], partitioned) if stage == 3 else ZERO[stage]
    assert apart(native, continued(config, native, f"to_zero{stage}", *FP32, *more)) <= FP32_BOUND
    if stage == 2:
        assert apart(zero2, continued(config, zero2, "to_native", *FP32)) <= FP32_BOUND


OTHERS = {
    "batches that grow": (2, "train.batch_size_ramp=[{steps: 4, global_batch_size: 4}]"),
    "three ranks": (3, "train.global_batch_size=12"),
    "GPT with biases": (2, "model.family=gpt", "model.num_kv_heads=4"),
    "lion": (2, "optimizer.name=lion", "optimizer.lr=0.001"),
    "mus, whose loss is scaled": (2, "parametrization.kind=mus"),
    "umup": (2, "parametrization.kind=umup"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", OTHERS)
def test_other_settings(config: Path, name: str, stage: int) -> None:
    ranks, *overrides = OTHERS[name]
    found = []
    for engine in ((), ZERO[stage]):
        label = f"run.name=other_{list(OTHERS).index(name)}_{stage}_{len(engine)}"
        more = ["checkpoint.interval=0", "train.steps=12", "train.eval_interval=0", label, *FP32, *overrides]
        finish(start(config, ranks, *more, *engine))
        found.append(losses(config.parent / label.removeprefix("run.name=")))
    ours, theirs = found
    assert len(ours) == 12
    assert max(abs(ours[step] - theirs[step]) / ours[step] for step in ours) <= FP32_BOUND


FP8 = {
    "O1": ("precision.level=O1",),
    "O2": ("precision.level=O2",),
    "lean moments": (
        "precision.level=O2",
        "precision.state.exp_avg_sq.format=e4m3",
        "precision.state.exp_avg_sq.sqrt=true",
    ),
    "delayed": ("precision.level=O1", "precision.recipe=te_delayed"),
    "blockwise": ("precision.level=O2", "precision.recipe=blockwise"),
}


def without_fp8_gradients(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """What ZeRO-3 allows: FP8 GEMMs, and activations kept in FP8."""
    states = [f"precision.state.{moment}.format=fp32" for moment in ("exp_avg", "exp_avg_sq")]
    level = [one for one in overrides if "state" not in one]
    return (*level, "precision.gradient.format=high_precision", *states)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recipe", FP8)
def test_fp8_losses_stay_by_our_engines(config: Path, partitioned: str, recipe: str, stage: int) -> None:
    overrides = FP8[recipe]
    name, more = f"{recipe.replace(' ', '_')}_{stage}", [*ZERO[stage]]
    if stage == 3:
        overrides = without_fp8_gradients(overrides)
        more.append(partitioned)
    ours = run(config, f"{name}_native", *overrides)
    theirs = run(config, f"{name}_deepspeed", *overrides, *more)
    assert apart(ours, theirs) <= FP8_BOUND
    if recipe in ("O2", "delayed"):
        again = continued(config, theirs, f"{name}_again", *overrides, *more)
        assert history(again) == history(theirs)
        assert weights(again) == weights(theirs)


@pytest.mark.slow
def test_activations_in_fp8_under_zero3(config: Path) -> None:
    more = (*without_fp8_gradients(FP8["O1"]), "precision.activations=fp8")
    assert apart(run(config, "kept_native", *more), run(config, "kept_zero3", *more, *ZERO[3])) <= FP8_BOUND


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(config: Path, zero2: Path) -> None:
    directory = config.parent / "killed"
    ranks = start(config, 2, "run.name=killed", "checkpoint.interval=20", *FP32, *ZERO[2])
    wait_for_step(ranks, directory / "metrics.jsonl", 27)
    ranks[1].send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.communicate(timeout=120)
    assert candidates(directory / "checkpoints")[0].name == "step_00000020"
    run(config, "killed", "checkpoint.resume=auto", *FP32, *ZERO[2])
    assert history(directory) == history(zero2)
    assert weights(directory) == weights(zero2)


@pytest.mark.slow
def test_a_step_with_nan_is_skipped_on_all_ranks(config: Path) -> None:
    """A rate that explodes: the run ends as our engine's does, and names the step."""
    ranks = start(
        config,
        2,
        "run.name=nan",
        *FP32,
        *ZERO[1],
        "optimizer.lr=1e30",
        "optimizer.clip_grad_norm=0",
        "schedule.kind=constant",
    )
    output = finish(ranks, expect=3)
    assert "gradients were not finite for 20 steps in a row" in output
