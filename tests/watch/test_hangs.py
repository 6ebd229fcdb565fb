"""Real hangs of real ranks: each ends the run in time, with the right name. Minutes:

python -m pytest -m slow tests/watch/test_hangs.py
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp8train.checkpoint.catalog import candidates
from fp8train.checkpoint.manifest import verify_checkpoint
from fp8train.checkpoint.ranks import Ranks
from tests.training.launching import start, wait_for_step, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT_S = 12.0
IN_TIME_S = LIMIT_S + 5
SLACK_S = 15.0
"""Of a busy machine, for processes to end and be noticed."""

OVERRIDES = (
    *("train.steps=100000", "train.eval_interval=0", "precision.level=O2", "run.name=r"),
    *(f"watchdog.{name}_timeout_s={LIMIT_S}" for name in ("step", "stopped", "save")),
)
MAIN = "\nfrom fp8train.cli import main\nmain()\n"
# Rank 1 believes that there is nothing to evaluate.
NO_EVALUATION = """
import os
from fp8train.training.loop import TrainingLoop
if os.environ["RANK"] == "1":
    TrainingLoop._evaluation_due = lambda self, done: False
"""


def end_of(processes: list[subprocess.Popen], began: float) -> tuple[list[int], list[str], float]:
    """Statuses and outputs of all ranks, and how long that took."""
    outputs = [process.communicate(timeout=LIMIT_S + 60)[0] for process in processes]
    return [process.returncode for process in processes], outputs, time.time() - began


def check_status(folder: Path, began: float) -> dict:
    """status.json names a rank in time, and the newest checkpoint is whole."""
    status = json.loads((folder / "r" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert status["time"] - began < IN_TIME_S
    newest = candidates(folder / "r" / "checkpoints")
    if newest:
        verify_checkpoint(newest[0], ranks=Ranks(None))
    return status


@pytest.mark.parametrize("rank", [0, 2])
def test_sigstop_of_one_of_four_ranks(tmp_path: Path, rank: int) -> None:
    processes = start(write_config(tmp_path), 4, *OVERRIDES)
    wait_for_step(processes, tmp_path / "r" / "metrics.jsonl", 8)
    began = time.time()
    os.kill(processes[rank].pid, signal.SIGSTOP)
    statuses, outputs, seconds = end_of(processes, began)
    assert seconds < IN_TIME_S + SLACK_S
    assert statuses == [-signal.SIGKILL if other == rank else 5 for other in range(4)]
    said = [text for text in outputs if "does not run" in text]
    assert said, outputs
    expected = (
        rf"rank {rank} \(host \S+, pid {processes[rank].pid}\) has not moved for 1\d s: step \d+, phase "
    )
    assert re.search(expected + r"\w+, stopped \(its process does not run\)", said[0])
    assert check_status(tmp_path, began)["rank"] == rank
    for other in set(range(4)) - {rank}:
        assert "most recent call first" in (tmp_path / "r" / "logs" / f"stacks_rank{other}.txt").read_text()


def test_sigstop_under_the_launch_script(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    process = subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), str(config), f"run.dir={tmp_path}", *OVERRIDES],
        env={**os.environ, "NPROC": "4", "OMP_NUM_THREADS": "1", "FP8TRAIN_VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step([process], tmp_path / "r" / "metrics.jsonl", 8)
    beat = json.loads((tmp_path / "r" / "heartbeats" / "rank3.json").read_text())
    began = time.time()
    os.kill(beat["process"]["pid"], signal.SIGSTOP)
    (status,), (output,), seconds = end_of([process], began)
    assert status == 5
    assert seconds < IN_TIME_S + SLACK_S
    last = output.rpartition("error: ")[2]
    assert re.match(r"rank 3 \(host \S+, pid \d+\) has not moved for 1\d s: step \d+, phase ", last)
    assert check_status(tmp_path, began)["rank"] == 3


def test_a_rank_without_data_is_named(tmp_path: Path) -> None:
    began = time.time()
    hang = "debug.fault_injection=[{kind: hang, rank: 2, step: 21, phase: data}]"
    processes = start(write_config(tmp_path), 4, *OVERRIDES, hang)
    wait_for_step(processes, tmp_path / "r" / "metrics.jsonl", 20)
    began = time.time()
    statuses, outputs, seconds = end_of(processes, began)
    assert seconds < IN_TIME_S + SLACK_S
    assert statuses == [5] * 4
    message = next(text for text in outputs if "has not moved" in text)
    assert re.search(r"rank 2 \(.*: step 21, phase data, alive, but 3 ranks wait for it in", message)
    assert check_status(tmp_path, began)["rank"] == 2
    stacks = (tmp_path / "r" / "logs" / "stacks_rank2.txt").read_text()
    assert re.search(r"in strike_process\n(.*\n)*.* in _one_step", stacks)


def test_ranks_that_disagree_about_an_evaluation_are_named(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    overrides = [*OVERRIDES, "train.eval_interval=10"]
    processes = start(config, 2, *overrides, program=("-c", NO_EVALUATION + MAIN))
    wait_for_step(processes, tmp_path / "r" / "metrics.jsonl", 10)
    began = time.time()
    statuses, outputs, _ = end_of(processes, began)
    assert statuses == [5] * 2
    message = next(text for text in outputs if "has moved" in text)
    assert "ranks wait for each other" in message
    assert re.search(r"rank 0 is in all_reduce/loss of dp, step 10, phase evaluate; ", message)
    assert re.search(r"rank 1 is in agreement on stopping of control, step 10, phase agree", message)
    check_status(tmp_path, began)


def test_a_single_process_that_hangs_ends_too(tmp_path: Path) -> None:
    hang = "debug.fault_injection=[{kind: hang, step: 21, phase: data}]"
    processes = start(write_config(tmp_path), 1, *OVERRIDES, hang)
    wait_for_step(processes, tmp_path / "r" / "metrics.jsonl", 20)
    began = time.time()
    statuses, (output,), _ = end_of(processes, began)
    assert statuses == [5]
    assert re.search(r"error: the process stood still for 1\d s: step 21, phase data", output)
    check_status(tmp_path, began)


def test_a_suspended_job_goes_on(tmp_path: Path) -> None:
    processes = start(write_config(tmp_path), 2, *OVERRIDES, "train.steps=60")
    metrics = tmp_path / "r" / "metrics.jsonl"
    wait_for_step(processes, metrics, 8)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT_S)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    statuses, outputs, _ = end_of(processes, time.time())
    assert statuses == [0, 0], outputs


def test_sigkill_ends_all_ranks_within_seconds(tmp_path: Path) -> None:
    processes = start(write_config(tmp_path), 4, *OVERRIDES)
    wait_for_step(processes, tmp_path / "r" / "metrics.jsonl", 8)
    began = time.time()
    os.kill(processes[1].pid, signal.SIGKILL)
    statuses, _, seconds = end_of(processes, began)
    assert seconds < SLACK_S
    assert 0 not in statuses


def test_a_slow_rank_is_named_once_with_its_host(tmp_path: Path) -> None:
    slow = "debug.fault_injection=[{kind: slow, rank: 2, step: 1, seconds: 0.3}]"
    processes = start(write_config(tmp_path), 4, *OVERRIDES, "train.steps=20", slow)
    statuses, outputs, _ = end_of(processes, time.time())
    assert statuses == [0] * 4
    assert len(re.findall(r"rank 2 on host \S+ is slow: its steps take", outputs[0])) == 1
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["time/slowest_rank"] == 2 for row in rows[2:])
    assert rows[-1]["time/step_max_s"] - rows[-1]["time/step_min_s"] > 0.2


def test_a_rank_that_holds_the_interpreter_lock_is_named_and_ended(tmp_path: Path) -> None:
    fault = "debug.fault_injection=[{kind: gil, rank: 1, step: 20, phase: data, seconds: 3600}]"
    processes = start(write_config(tmp_path), 2, *OVERRIDES, fault)
    wait_for_step(processes, tmp_path / "r" / "metrics.jsonl", 18)
    began = time.time()
    statuses, outputs, seconds = end_of(processes, began)
    assert seconds < IN_TIME_S + SLACK_S
    assert statuses == [5, -signal.SIGABRT]
    assert re.search(r"rank 1 \(.*something holds Python's interpreter lock", outputs[0])
    assert "Fatal Python error: Aborted" in outputs[1]  # with its stacks
    check_status(tmp_path, began)
