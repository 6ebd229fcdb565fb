"""What a person's mistake looks like through the launch script: a few lines, the remedy last, status 2; and
that the rank that failed is named, not one that lost its peers.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8train.checkpoint.save import save_checkpoint
from fp8train.cli import run_command
from fp8train.config.environment import World, world_from_environment
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import load_config
from fp8train.config.schema import to_plain
from fp8train.data.indexed_dataset import IndexedDatasetWriter
from fp8train.planning.rank_bytes import RankBytes
from fp8train.run_dir.directory import RunDir
from fp8train.training.preflight import preflight

ROOT = Path(__file__).parents[1]

CONFIG = """
model: {family: llama, num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2}
data: {prefix: PREFIX, seq_length: 32, split: [1, 0, 0]}
optimizer: {lr: 0.01}
train: {steps: 8, global_batch_size: 8, micro_batch_size: 2}
logging: {interval: 1, tensorboard: false}
run: {threads: 1, device: cpu, dir: FOLDER, name: fresh}
"""


def _environment(**more: str) -> dict[str, str]:
    """As a person's shell has it, whatever started these tests."""
    launcher = re.compile(r"(RANK|LOCAL_.*|WORLD_SIZE|MASTER_.*|NPROC|TORCHELASTIC_.*|FP8TRAIN_.*|LOGLEVEL)$")
    kept = {name: value for name, value in os.environ.items() if not launcher.match(name)}
    return {**kept, "FP8TRAIN_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def launch(
    config: Path, processes: int, *overrides: str, address_space: int | None = None, **environment: str
) -> tuple[int, list[str]]:
    """Exit status of ``launch/torchrun.sh`` and the lines that a terminal would show."""

    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    done = subprocess.run(
        [str(ROOT / "launch" / "torchrun.sh"), str(config), *overrides],
        env=_environment(NPROC=str(processes), **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        preexec_fn=limit,
    )
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"starting {processes} process"), first
    return done.returncode, lines


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's file, its dataset, another dataset's tokenizer, and a run ``old`` saved at step 4."""
    folder = tmp_path_factory.mktemp("mistakes")
    text = folder / "text"
    text.mkdir()
    for number in range(3):
        (text / f"{number}.txt").write_text("".join(f"line {i} of text {number}\n" for i in range(300)))
    for name, size in (("corpus", "280"), ("other", "290")):
        words = ["data", "prepare", str(text), "--output", str(folder / name), "--vocab-size", size]
        assert run_command([*words, "--train-tokenizer", "bpe", "--workers", "1"]) == 0
    path = folder / "run.yaml"
    path.write_text(CONFIG.replace("PREFIX", str(folder / "corpus")).replace("FOLDER", str(folder)))
    _old_run(path)
    return path


def _old_run(path: Path) -> None:
    resolved = load_config(path, ["run.name=old"])
    data = preflight(resolved, World())
    meta = {"config": to_plain(resolved.config), "trainer": {"updates": 4}, "data": data.train.state_dict(4)}
    run = RunDir.open(path.parent, "old", resume="never", overwrite=False, group=None)
    run.write_description("model: {}\n", {})
    tensors = {"x": torch.ones(2)}
    save_checkpoint(run.checkpoints, 4, tensors, meta=meta, rank_state={}, group=None, keep_last=2)
    run.write_status("stopped", step=4, reason="STOP file", exit_code=0)
    run.close()


@dataclass(frozen=True)
class Mistake:
    """Overrides and environment, something that the first line tells, and the remedy in the last."""

    overrides: tuple[str, ...]
    says: str
    remedy: str
    environment: Mapping[str, str] | None = None


MISTAKES = {
    "misspelt_key": Mistake(
        ("optimizer.lerning_rate=1",), "optimizer.lerning_rate", "did you mean optimizer.lr"
    ),
    "tp_does_not_divide": Mistake(("parallel.tp=3",), "parallel.tp", "legal: parallel.tp=1 or 2"),
    "missing_data": Mistake(
        ("data.prefix=/nowhere/text",), "/nowhere/text", "make it with fp8train data prepare"
    ),
    "wrong_tokenizer": Mistake(
        ("data.tokenizer=OTHER",), "is not the one that", "use the tokenizer beside the dataset"
    ),
    "existing_run": Mistake(
        ("run.name=old", "checkpoint.resume=never"), "already holds a run", "run.name=OTHER"
    ),
    "changed_setting": Mistake(
        ("run.name=old", "optimizer.lr=0.5"), "optimizer.lr: 0.01 -> 0.5", "accept_changes=[optimizer.lr]"
    ),
    "dashes": Mistake(("--optimizer.lr=1",), "--optimizer.lr=1", "section.key=value"),
    "bad_world_size": Mistake((), "WORLD_SIZE is 'two'", "unset WORLD_SIZE", {"WORLD_SIZE": "two"}),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_few_lines_with_the_remedy_last(config: Path, name: str, processes: int) -> None:
    mistake = MISTAKES[name]
    before = sorted(path for path in config.parent.rglob("*"))
    overrides = [text.replace("OTHER", str(config.parent / "other.model")) for text in mistake.overrides]
    status, lines = launch(config, processes, *overrides, **(mistake.environment or {}))
    assert status == 2, lines
    assert 1 <= len(lines) <= 4, lines  # five with the one that says what starts
    assert lines[0].startswith("error: "), lines
    assert mistake.says in lines[0], lines
    assert mistake.remedy in lines[-1], lines
    assert sorted(path for path in config.parent.rglob("*")) == before  # refused before anything began


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(config: Path) -> None:
    """More than 8 GiB in a process that may address so much."""
    before = sorted(path for path in config.parent.rglob("*"))
    status, lines = launch(config, 1, "run.name=huge", "model.vocab_size=16777216", address_space=2**33)
    assert status == 2, lines
    assert lines[0].startswith("error: weights, gradients and optimizer states of a rank take"), lines
    assert "parallel.zero: 1" in lines[-1], lines
    assert len(lines) <= 4, lines
    assert sorted(path for path in config.parent.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_out_of_memory_is_a_few_lines_with_the_remedy_last(config: Path, processes: int) -> None:
    """What is stored would fit into what a process may address, but torch itself takes more than is left."""
    name = f"memory{processes}"
    overrides = (f"run.name={name}", "model.vocab_size=4194304", "train.global_batch_size=2")
    overrides = (*overrides, "train.micro_batch_size=1")
    settings = load_config(config, overrides).config
    stored = RankBytes(settings, 2**22, dp=processes, micro_batches=2 // processes).largest().model.total
    status, lines = launch(config, processes, *overrides, address_space=stored + 2**28)
    assert status == 2, lines
    assert len(lines) == 2, lines
    assert re.fullmatch(
        r"error: rank [01] ran out of CPU memory before the first step, asking for [\d.]+ [MG]iB; "
        r"the most it ever held: [\d.]+ [MG]iB",
        lines[0],
    )
    assert "parallel.tp (1)" in lines[1]
    assert ("parallel.zero: 1" in lines[1]) == (processes == 2)
    record = json.loads((config.parent / name / "status.json").read_text())
    assert (record["state"], record["exit_code"], record["step"]) == ("failed", 2, 0)
    assert "ran out of CPU memory" in record["reason"]
    assert "ran out of CPU memory" in (config.parent / name / f"logs/rank{record['rank']}.log").read_text()


def test_debug_shows_the_traceback_wherever_it_is_written(config: Path) -> None:
    status, lines = launch(config, 2, "optimizer.lerning_rate=1", "--debug", "run.seed=3")
    assert status == 1
    assert lines[0].startswith("Traceback")
    assert "ConfigError" in lines[-1]


# ---- what only a rank can know


@pytest.fixture
def bad_token(tmp_path: Path) -> Path:
    """A run over a dataset with a single token outside the vocabulary, which one of two ranks meets."""
    writer = IndexedDatasetWriter(tmp_path / "text", vocab_size=128)
    for document in range(60):
        tokens = np.arange(document, document + 200) % 100
        tokens[100] = 120 if document == 30 else 0
        writer.add_document(tokens)
    writer.finish()
    path = tmp_path / "run.yaml"
    text = CONFIG.replace("PREFIX", str(tmp_path / "text")).replace("FOLDER", str(tmp_path))
    path.write_text(
        text.replace("num_kv_heads: 2", "num_kv_heads: 2, vocab_size: 100").replace("steps: 8", "steps: 60")
    )
    return path


def test_the_error_of_one_rank_is_told_once_and_recorded(bad_token: Path) -> None:
    status, lines = launch(bad_token, 2)
    assert status == 2, lines
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, lines
    told = lines[errors[0] :]
    assert "120" in told[0]
    assert len(told) <= 5
    assert not any("Traceback" in line or "elastic" in line for line in lines), lines
    run = bad_token.parent / "fresh"
    record = json.loads((run / "status.json").read_text())
    assert record["state"] == "failed"
    assert f"error: {record['reason']}" == told[0]
    assert not record["peers_lost"]
    logs = {rank: (run / f"logs/rank{rank}.log").read_text() for rank in (0, 1)}
    assert record["reason"] in logs[record["rank"]]
    # The peer only lost its connection, and says whose fault that was.
    peer = 1 - record["rank"]
    assert f"error: rank {record['rank']} failed: {record['reason']}" in logs[peer]


def test_a_killed_rank_is_named_by_the_launcher(bad_token: Path) -> None:
    process = subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), str(bad_token), "model.vocab_size=128", "train.steps=100000"],
        env=_environment(NPROC="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        while not (line := process.stdout.readline()).startswith("step "):
            assert line, "ended early"
        os.kill(process_of(bad_token, rank=1), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    lines = [line for line in output.splitlines() if not line.startswith(("step ", "SIGTERM: "))]
    assert process.returncode == 1
    assert lines[0] == "error: rank 1 was killed by SIGKILL", lines
    assert len(lines) == 2, lines
    assert "out of memory" in lines[1]
    record = json.loads((bad_token.parent / "fresh" / "status.json").read_text())
    assert (record["state"], record["rank"], record["exit_code"]) == ("failed", 1, 1)
    assert record["reason"] == "rank 1 was killed by SIGKILL"
    assert record["step"] >= 1


LAUNCHERS = {
    "script": [str(ROOT / "launch" / "torchrun.sh")],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "fp8train", "train"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "exception"])
def test_a_job_of_four_ranks_ends_within_ten_seconds_of_its_first_loss(
    bad_token: Path, launcher: str, how: str
) -> None:
    """And names rank 2, on the screen, in status.json and in the logs of its peers."""
    command = [*LAUNCHERS[launcher], str(bad_token), "model.vocab_size=128", "train.steps=100000"]
    if how == "exception":
        command.append("debug.fault_injection=[{kind: exception, rank: 2, step: 3}]")
    with open(bad_token.parent / "output", "w+") as output:
        process = subprocess.Popen(command, env=_environment(NPROC="4"), stdout=output, stderr=output)
        run = bad_token.parent / "fresh"
        try:
            deadline = time.monotonic() + 120
            metrics = run / "metrics.jsonl"
            while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            began = time.time()
            if how != "exception":
                os.kill(process_of(bad_token, rank=2), getattr(signal, how))
            assert process.wait(60) == 1
            ended = time.time()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        output.seek(0)
        lines = [line for line in output.read().splitlines() if not line.startswith("step ")]
    if how == "exception":
        began = json.loads((run / "logs/failures/rank2.json").read_text())["time"]
    assert ended - began < 10, lines
    record = json.loads((run / "status.json").read_text())
    assert (record["state"], record["rank"], record["exit_code"]) == ("failed", 2, 1)
    told = {"SIGKILL": "rank 2 was killed by SIGKILL", "SIGSEGV": "rank 2 was killed by SIGSEGV"}
    if how == "exception":
        assert any(
            line.startswith("rank 2: Traceback") or line == "Traceback (most recent call last):"
            for line in lines
        )
        assert "injected" in record["reason"].lower()
    elif launcher == "script":
        assert record["reason"] == told[how]
        assert f"error: {told[how]}" in lines
    else:  # nobody but torchrun knows the signal; its summary comes after our word
        assert record["reason"].startswith("rank 2 ended without a word (process ")
        assert any(line.startswith("error: rank 2 failed: ended without a word") for line in lines), lines
    for rank in (0, 1, 3):
        assert "error: rank 2 failed: " in (run / f"logs/rank{rank}.log").read_text()


def process_of(config: Path, rank: int) -> int:
    """The process of a rank of the run of ``config``."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                b"fp8train" in words
                and str(config).encode() in words
                and f"RANK={rank}".encode() in variables
            ):
                return int(folder.name)
        time.sleep(0.1)
    raise AssertionError(f"no rank {rank}")


# ---- the environment


FULL = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip


def test_the_environment_of_torchrun_is_read() -> None:
    assert world_from_environment(FULL) == World(4, 3, 2, 1, supervised=False)
    assert world_from_environment(FULL | {"TORCHELASTIC_RUN_ID": "x"}).supervised
    assert world_from_environment({}) == World()
    assert world_from_environment({"WORLD_SIZE": "1"}) == World()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, not a whole number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "4"}, "RANK is '4' in the environment, not a whole number from 0 to 3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2' in the environment, not a whole number from 0 to 1"),
        ({"RANK": "", "MASTER_ADDR": ""}, "WORLD_SIZE is 4 but RANK, MASTER_ADDR are not set"),
    ],
)
def test_a_wrong_environment_is_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        world_from_environment(FULL | changes)
    assert says in str(caught.value)
    assert "unset WORLD_SIZE" in str(caught.value)


def test_train_without_a_launcher_refuses_half_an_environment(config: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fp8train", "train", str(config)],
        env=_environment(WORLD_SIZE="2"), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: WORLD_SIZE is 2 but RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, "
    )
    assert len(done.stderr.splitlines()) == 1
