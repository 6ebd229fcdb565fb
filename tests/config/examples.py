"""Configs that the tests start from."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.resolve import load_config

MINIMAL = """\
model:
  family: llama
  num_layers: 2
  hidden_size: 64
  num_heads: 4
data:
  prefix: data/corpus
  seq_length: 32
optimizer:
  lr: 3e-4
train:
  steps: 10
  global_batch_size: 8
  micro_batch_size: 4
"""


def minimal() -> dict[str, Any]:
    """The same as a mapping."""
    return {
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 64, "num_heads": 4},
        "data": {"prefix": "data/corpus", "seq_length": 32},
        "optimizer": {"lr": 3e-4},
        "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 4},
    }


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    """A file with ``text``."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text), encoding="utf-8")
    return path


def message_of(path: Path, *overrides: str) -> str:
    """The message that loading ``path`` fails with, the folder's name removed."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    assert caught.value.exit_status == 2
    return message.replace(f"{path.parent}/", "")
