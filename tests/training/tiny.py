"""A tiny model on synthetic text: what the training tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config
from fp8train.data.batches import GlobalBatches
from fp8train.data.samples import Place
from fp8train.step.trainer import Trainer

VOCAB = 64


class PatternSamples:
    """Samples whose next token mostly depends on the last: something a model can learn in a few steps."""

    def __init__(self, seq_length: int, count: int = 1024) -> None:
        self.seq_length, self.samples_per_epoch = seq_length, count
        self.description, self.fingerprint = "pattern", f"pattern/{seq_length}/{count}"

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]."""
        random = np.random.default_rng(index)
        tokens = [int(random.integers(VOCAB))]
        for _ in range(self.seq_length):
            tokens.append((tokens[-1] * 5 + 3 + int(random.integers(2))) % VOCAB)
        return np.array(tokens, dtype=np.int64)

    def place(self, index: int, position: int) -> Place:
        """Not needed: every token is legal."""
        raise AssertionError


def tiny_config(overrides: list[str] | tuple[str, ...] = (), **sections: Any) -> Config:
    """A two-layer model with FP64-friendly sizes; ``overrides`` as on the command line."""
    mapping: dict[str, Any] = {
        "model": {
            "family": "llama",
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
            "vocab_size": VOCAB,
        },
        "data": {"prefix": "unused", "seq_length": 16},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 1},
        "logging": {"cast_statistics_interval": 0},
        **sections,
    }
    return resolve_mapping(mapping, overrides).config


def of_one_process(overrides: Sequence[str]) -> list[str]:
    """``overrides`` without what nothing reads in one process."""
    return [text for text in overrides if not text.startswith(("precision.traffic.", "parallel.zero"))]


def alone() -> Processes:
    """A job of one process on the CPU."""
    return Processes(torch.device("cpu"), 1, 0, CountedGroup(None), None)


def batches(config: Config, processes: Processes) -> GlobalBatches:
    """This rank's view of the synthetic text."""
    return GlobalBatches(
        PatternSamples(config.data.seq_length),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=processes.dp.rank,
        dp_size=processes.dp.size,
        vocab_size=VOCAB,
    )


def losses(config: Config, processes: Processes, steps: int) -> tuple[list[float], Trainer]:
    """Train for ``steps`` and return every global loss."""
    trainer = Trainer(config, processes, vocab_size=VOCAB)
    data = batches(config, processes)
    return [float(trainer.step(i, data.batch(i)).loss) for i in range(steps)], trainer
