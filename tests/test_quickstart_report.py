"""The numbers that the quick start adds to those of its runs: the bigram model that a run must beat."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fp8train.config.resolve import load_config
from fp8train.data.loading import open_data
from tests.inference.trained import make_dataset
from tests.test_docs import ROOT
from tools.quickstart_report import bigram_loss


def test_the_bigram_model_counts_what_the_runs_saw(tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path)
    overrides = [f"data.prefix={prefix}", "data.seq_length=32", "data.split=[0.7,0.3,0]", "train.steps=5"]
    overrides += ["train.eval_batches=3"]
    resolved = load_config(ROOT / "configs/quickstart/llama.yaml", overrides)
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
    data = open_data(resolved.config.data, vocab_size=None, seed=1234, total_steps=5, **sizes)
    assert data.valid is not None

    def pairs(batches: list[np.ndarray]) -> list[tuple[int, int]]:
        rows = [row.tolist() for batch in batches for row in batch.reshape(-1, 33)]
        return [pair for row in rows for pair in itertools.pairwise(row)]

    seen = pairs([data.train.batch(step).numpy() for step in range(5)])
    valid = pairs([data.valid.batch(step).numpy() for step in range(3)])
    together, before = Counter(seen), Counter(first for first, _ in seen)
    after = Counter(second for _, second in seen)

    def loss(weight: float) -> float:
        total = 0.0
        for first, second in valid:
            unigram = (after[second] + 1) / (len(seen) + data.vocab_size)
            bigram = together[first, second] / before[first] if before[first] else 0.0
            total -= math.log(weight * bigram + (1 - weight) * unigram)
        return total / len(valid)

    best = min(loss(i / 20) for i in range(1, 20))
    assert bigram_loss(resolved) == pytest.approx(best, rel=1e-12)
    assert best < loss(0.05)  # so that the choice of the weight is seen
