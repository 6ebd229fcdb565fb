"""Checkpoints that are kept as the format's memory: what makes them, and the run that they continue.

    python -m tests.checkpoint.kept tests/fixtures/checkpoints

wrote one per level, with the numbers that a later program must find in it: a digest of every stored tensor,
and the losses of the run that was never interrupted. Made once for each format; never made anew to please a
test.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp8train.checkpoint.load import OpenCheckpoint, open_checkpoint
from fp8train.cli import run_command
from fp8train.data.indexed_dataset import IndexedDatasetWriter

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
LEVELS = ("O0", "O1", "O2", "O3")
STEP, STEPS, VOCAB = 3, 5, 64

CONFIG = """
model: {family: llama, num_layers: 2, hidden_size: 16, num_heads: 2, num_kv_heads: 1, ffn_hidden_size: 32,
        vocab_size: 64, vocab_multiple: 64, tie_embeddings: true}
data: {prefix: PREFIX, seq_length: 16, split: [1, 0, 0]}
optimizer: {lr: 0.01}
train: {steps: 5, global_batch_size: 4, micro_batch_size: 2}
checkpoint: {interval: 3, keep_every: 3}
logging: {interval: 1, tensorboard: false, cast_statistics_interval: 0}
run: {threads: 1, device: cpu}
"""


def write_config(folder: Path) -> Path:
    """A config file and the dataset it names; the same tokens wherever it is."""
    generator = np.random.default_rng(0)
    writer = IndexedDatasetWriter(folder / "text", vocab_size=VOCAB)
    for _ in range(20):
        start, length = generator.integers(VOCAB), generator.integers(30, 100)
        writer.add_document((start + 7 * np.arange(length) + generator.integers(0, 2, length)) % VOCAB)
    writer.finish()
    path = folder / "run.yaml"
    path.write_text(CONFIG.replace("PREFIX", str(folder / "text")))
    return path


def train(config: Path, name: str, *overrides: str) -> Path:
    """A run beside its config; its directory."""
    command = ["train", str(config), f"run.dir={config.parent}", f"run.name={name}", *overrides]
    assert run_command(command) == 0
    return config.parent / name


def losses(run: Path) -> list[float]:
    """Of the steps after the checkpoint."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if row["step"] > STEP]


def digests(opened: OpenCheckpoint) -> dict[str, str]:
    """Of the bytes of every stored tensor."""
    tensors = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in opened.tensors.items()}
    opened.read(tensors)
    return {name: _digest(tensor) for name, tensor in sorted(tensors.items())}


def _digest(tensor: Tensor) -> str:
    plain = tensor.contiguous().reshape(-1).view(torch.uint8)
    shape = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(shape + plain.numpy().tobytes()).hexdigest()[:16]


def unpack(level: str, folder: Path) -> Path:
    """The kept checkpoint of a level, in ``folder``."""
    with tarfile.open(FIXTURES / f"{level}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"step_{STEP:08d}"


def expected(level: str) -> dict[str, Any]:
    """What was recorded of it: ``losses`` and ``tensors``."""
    found: dict[str, Any] = json.loads((FIXTURES / f"{level}.json").read_text())
    return found


def main() -> None:
    """Write the fixtures into the folder that the command line names."""
    root = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder))
        for level in LEVELS:
            run = train(config, level, f"precision.level={level}")
            kept = run / "checkpoints" / f"step_{STEP:08d}"
            with tarfile.open(root / f"{level}.tar.xz", "w:xz") as archive:
                archive.add(kept, kept.name)
            found = {"losses": losses(run), "tensors": digests(open_checkpoint(kept, group=None))}
            (root / f"{level}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
