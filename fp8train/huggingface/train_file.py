"""The configuration of an imported model, and the YAML file from which a person continues its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8train.config.dump import dump_plain
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import Config

TRAIN_FILE = "train.yaml"
_LONGEST = 1024

_TEMPLATE = """\
# Continues the training of {name}, imported from {source}.
#   fp8train data prepare TEXT... --output data/corpus --tokenizer {tokenizer}
#   fp8train train {file}
run:
  name: continued
{model}data:
  prefix: data/corpus  # your dataset
  seq_length: {seq_length}  # up to {max_seq_len}
precision:
  level: O2
optimizer:
  lr: 5.0e-5  # of continued training: a tenth of that of pretraining
schedule:
  warmup_steps: 50
train:
  steps: 1000
  global_batch_size: 8
  micro_batch_size: 1
checkpoint:
  init_from: {checkpoint}  # the weights
"""


def imported_config(settings: dict[str, Any], source: str) -> Config:
    """A complete configuration around a ``model`` section: BF16, as the checkpoint of an import has it.

    Args:
        settings: the section.
        source: names it in messages.

    Raises:
        ConfigError: the sizes contradict each other.
    """
    mapping = {
        "model": settings,
        "data": {"prefix": "data/corpus", "seq_length": min(_LONGEST, settings["max_seq_len"])},
        "optimizer": {"lr": 5e-5},
        "schedule": {"warmup_steps": 50},
        "train": {"steps": 1000, "global_batch_size": 8, "micro_batch_size": 1},
    }
    return resolve_mapping(mapping, source=source).config


def write_train_file(
    path: Path,
    settings: dict[str, Any],
    *,
    name: str,
    source: Path,
    final: Path,
    tokenizer: str | None,
) -> None:
    """Write the YAML file from which a person continues an imported model's training.

    Args:
        path: where.
        settings: the ``model`` section of :func:`imported_config`, as written.
        name: of the architecture.
        source: the folder that was imported.
        final: where the run directory will be.
        tokenizer: file name of the tokenizer in it.
    """
    text = _TEMPLATE.format(
        name=name,
        source=source,
        file=final / TRAIN_FILE,
        checkpoint=json.dumps(str(final)),  # quoted, as YAML wants paths with blanks or digits alone
        tokenizer=final / (tokenizer or "tokenizer.json"),
        model=dump_plain({"model": settings}),
        seq_length=min(_LONGEST, settings["max_seq_len"]),
        max_seq_len=settings["max_seq_len"],
    )
    path.write_text(text)
