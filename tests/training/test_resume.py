"""Kill a run with SIGKILL, resume it, and get the run that was never killed: same losses, same weights, to
the bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp8train.checkpoint.catalog import candidates
from tests.training.launching import STEPS, finish, history, start, wait_for_step, weights, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run."""
    return write_config(tmp_path_factory.mktemp("resume"))


def kill_at(processes: list[subprocess.Popen], metrics: Path, step: int, delay: float) -> None:
    """SIGKILL every rank once ``step`` is logged and ``delay`` seconds have passed."""
    wait_for_step(processes, metrics, step)
    time.sleep(delay)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()


PRECISIONS = {
    "bf16": ["precision.level=O0"],
    "fp8": ["precision.gemm.fp8=true"],
    "O1": ["precision.level=O1"],
    "O2": ["precision.level=O2"],
    "O2-paper": ["precision.level=O2", "precision.profile=paper"],
    "O1-coat": ["precision.level=O1", "precision.state.plan=coat"],
    "O3-e4m3-e5m2": ["precision.level=O3", "precision.state.plan=e4m3_e5m2"],
    "O2-lean": ["precision.level=O2", "precision.state.plan=lean"],
    "O2-exact": ["precision.level=O2", "precision.gradient.fp8.reduce=exact"],
    "O2-feedback": ["precision.level=O2", "precision.gradient.fp8.error_feedback=true"],
}
# Rows of 256 have blocks of 128, which a cut in two leaves whole.
THREE_D = [
    *("parallel.tp=2", "parallel.pp=2", "parallel.zero=1"),
    *("model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=64", "model.ffn_hidden_size=256"),
]
PRECISIONS |= {f"{level}-3d": [f"precision.level={level}", *THREE_D] for level in ("O0", "O1", "O2", "O3")}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world_size", "precision"),
    [
        (2, "O2"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in ((1, "fp8"), (1, "bf16"), (2, "bf16"), (2, "fp8"), (1, "O1"), (2, "O1"), (1, "O2"))
        ),
        *(pytest.param(8, f"{level}-3d", marks=SLOW) for level in ("O0", "O1", "O2", "O3")),
        *(pytest.param(*case, marks=SLOW) for case in ((2, "O1-coat"), (2, "O3-e4m3-e5m2"))),
        *(pytest.param(n, p, marks=SLOW) for n in (1, 2) for p in ("O2-paper", "O2-exact", "O2-feedback")),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(config: Path, world_size: int, precision: str) -> None:
    overrides = PRECISIONS[precision]
    names = [f"{precision}{world_size}_{kind}" for kind in ("whole", "again", "killed")]
    for name in names[:2]:
        finish(start(config, world_size, *overrides, f"run.name={name}"))
    whole, again, killed = (config.parent / name for name in names)
    assert history(whole) == history(again), "two runs with one seed differ"
    assert weights(whole) == weights(again)

    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    step, delay = generator.randrange(5, STEPS // 2), generator.random() * 0.02
    running = start(config, world_size, *overrides, f"run.name={names[2]}")
    kill_at(running, killed / "metrics.jsonl", step, delay)
    saved = {path.name for path in candidates(killed / "checkpoints")}
    assert saved and f"step_{STEPS:08d}" not in saved
    output = finish(start(config, world_size, *overrides, f"run.name={names[2]}", "checkpoint.resume=auto"))
    assert "resumed from" in output
    assert history(killed) == history(whole)
    assert weights(killed) == weights(whole)


def test_a_run_continues_on_another_number_of_ranks(config: Path) -> None:
    finish(start(config, 1, "precision.compute=fp64", "run.name=elastic_whole"))
    processes = start(config, 1, "precision.compute=fp64", "run.name=elastic")
    kill_at(processes, config.parent / "elastic/metrics.jsonl", 9, 0.0)
    finish(start(config, 2, "precision.compute=fp64", "run.name=elastic", "checkpoint.resume=auto"))
    one, two = (
        {row[0]: row[1] for row in history(config.parent / name) if row[1] is not None}
        for name in ("elastic_whole", "elastic")
    )
    assert two.keys() == one.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-9)


def test_another_architecture_is_refused(config: Path) -> None:
    finish(start(config, 1, "run.name=shape", "train.steps=2", "checkpoint.interval=2"))
    output = finish(
        start(
            config, 1, "run.name=shape", "checkpoint.resume=auto", "model.hidden_size=32", "model.num_heads=2"
        ),
        expect=2,
    )
    assert "model.hidden_size: 64 -> 32" in output
    assert len(output.partition("error: ")[2].strip().splitlines()) <= 5
    status = json.loads((config.parent / "shape/status.json").read_text())
    assert (status["state"], status["step"]) == ("completed", 2), "it was refused before anything began"


# Several commands in one process: most of a start is imports.
COMMANDS = """
import json, sys
from fp8train.cli import run_command
print("exit", [run_command(["train", *json.loads(each)]) for each in sys.argv[1:]])
"""


def test_a_mended_command_starts_under_the_name_of_the_one_that_failed(config: Path) -> None:
    folder = str(config.parent)
    common = [str(config), f"run.dir={folder}", "train.steps=1", "train.eval_interval=0"]
    mended = [*common, "run.name=mended", f"checkpoint.init_from={folder}/source"]
    wrong = [*mended, "model.hidden_size=32", "model.num_heads=2"]
    commands = [json.dumps(each) for each in ([*common, "run.name=source"], wrong, mended, mended)]
    done = subprocess.run([sys.executable, "-c", COMMANDS, *commands], capture_output=True, text=True)
    assert "exit [0, 2, 0, 2]" in done.stdout, done.stderr
    assert "holds another model" in done.stderr
    assert "already holds a run" in done.stderr
