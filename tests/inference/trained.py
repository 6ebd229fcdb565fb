"""A small run on text, with a tokenizer: what tests of evaluation share."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import torch

from fp8train.cli.train_command import train_command
from fp8train.data.prepare import prepare

_TEXT = "how to cut paper with sharp scissors then fold it twice and glue the wet edge under warm light"
WORDS = _TEXT.split()


def sentence(draw: random.Random, words: int = 8) -> str:
    """Words in random order."""
    return " ".join(draw.choice(WORDS) for _ in range(words))


def make_dataset(folder: Path) -> Path:
    """A dataset of such sentences; its prefix."""
    draw = random.Random(3)
    documents = [folder / f"{i}.txt" for i in range(20)]
    for document in documents:
        document.write_text("".join(f"{sentence(draw)}.\n" for _ in range(40)))
    prepare(documents, folder / "text", vocab_size=360, workers=1)
    return folder / "text"


def train_small(folder: Path, *overrides: str) -> Path:
    """Train a few steps in this process, in FP8 unless told otherwise; the run directory."""
    prefix = make_dataset(folder)
    config = folder / "run.yaml"
    config.write_text(
        f"""
model: {{family: llama, num_layers: 2, hidden_size: 32, num_heads: 2, num_kv_heads: 2, ffn_hidden_size: 64}}
data: {{prefix: {prefix}, seq_length: 32, split: [0.7, 0.3, 0]}}
optimizer: {{lr: 0.01}}
train: {{steps: 6, global_batch_size: 2, micro_batch_size: 2}}
precision: {{level: O2}}
checkpoint: {{interval: 0}}
logging: {{tensorboard: false, cast_statistics_interval: 0}}
run: {{threads: 1, dir: {folder}, name: run}}
"""
    )
    threads = torch.get_num_threads()
    with ExitStack() as lifetime:
        assert train_command(config, overrides, lifetime) == 0
    torch.set_num_threads(threads)
    return folder / "run"
