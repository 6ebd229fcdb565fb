"""Runs started as a user would, with their records: what the tests of kills and stops share."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fp8train.checkpoint.catalog import candidates
from fp8train.data.indexed_dataset import IndexedDatasetWriter
from fp8train.run_dir.metrics import read_metrics
from tests.free_ports import free_ports

STEPS = 40

CONFIG = """
model: {family: llama, num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, vocab_size: 128}
data: {prefix: PREFIX, seq_length: 32, split: [0.8, 0.2, 0]}
optimizer: {lr: 0.01}
train: {steps: STEPS, global_batch_size: 8, micro_batch_size: 2, eval_interval: 10, eval_batches: 2}
checkpoint: {interval: 4}
logging: {interval: 1, tensorboard: false, cast_statistics_interval: 6}
run: {threads: 1}
"""


def write_config(folder: Path) -> Path:
    """A config file and the dataset it names."""
    generator = np.random.default_rng(0)
    writer = IndexedDatasetWriter(folder / "text", vocab_size=128)
    for _ in range(60):
        start, length = generator.integers(128), generator.integers(50, 400)
        writer.add_document((start + 7 * np.arange(length) + generator.integers(0, 2, length)) % 128)
    writer.finish()
    path = folder / "run.yaml"
    path.write_text(CONFIG.replace("PREFIX", str(folder / "text")).replace("STEPS", str(STEPS)))
    return path


def start(
    config: Path, world_size: int, *overrides: str, program: tuple[str, ...] = ("-m", "fp8train")
) -> list[subprocess.Popen]:
    """Start the ranks of a run as torchrun would; ``program`` is what Python runs."""
    (port,) = free_ports(1)
    processes = []
    for rank in range(world_size):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            env |= {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [
            sys.executable,
            *program,
            "train",
            str(config),
            f"run.dir={config.parent}",
            *overrides,
        ]
        processes.append(
            subprocess.Popen(
                command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                preexec_fn=_as_in_a_terminal,
            )
        )
    return processes


def _as_in_a_terminal() -> None:
    """Runs ignore SIGHUP where they inherit that, as from tests that were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def finish(processes: list[subprocess.Popen], expect: int = 0, timeout_s: float = 120) -> str:
    """Wait for all ranks; the output of rank 0."""
    output = [process.communicate(timeout=timeout_s)[0] for process in processes]
    assert [process.returncode for process in processes] == [expect] * len(processes), "\n".join(output)
    return output[0]


def history(directory: Path) -> list[tuple]:
    """Everything numeric that the run recorded and that does not depend on the clock."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "optim/grad_norm", "optim/lr", "eval/loss")
    casts = directory / "casts.jsonl"
    return [tuple(row.get(key) for key in ("step", *keys)) for row in rows] + (
        casts.read_text().splitlines() if casts.exists() else []
    )


def weights(directory: Path, steps: int = STEPS) -> str:
    """Hash of the final checkpoint's data files, from its manifest."""
    newest = candidates(directory / "checkpoints")[0]
    assert newest.name == f"step_{steps:08d}"
    shards = sorted(newest.glob("*.distcp"))
    assert shards
    return hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()


def wait_for_step(processes: list[subprocess.Popen], metrics: Path, step: int) -> None:
    """Return once ``step`` is logged. The last line may be one that is being written."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        records = read_metrics(metrics) if metrics.exists() else []
        if records and records[-1]["step"] >= step:
            return
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached in 90 s")
