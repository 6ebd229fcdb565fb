"""Names in a run directory, and whether a path can hold a checkpoint, judged by names alone.

A mistyped path should answer at once, not after seconds of importing torch; so this needs none of it. What is
*in* a checkpoint is :mod:`fp8train.checkpoint`'s affair.
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS_DIR = "checkpoints"
"""Of a run: holds a directory for each checkpoint."""
MANIFEST_FILE = "manifest.json"
"""Of a checkpoint: what belongs to it. Without it there is none."""
STEP_NAME = re.compile(r"step_(\d{8,})")
"""Name of a checkpoint's directory."""
REPLACED_SUFFIX = ".replaced"
"""Of a checkpoint that a new save of the same step is about to replace."""

WHAT_TO_GIVE = f"give a run directory, its {CHECKPOINTS_DIR} directory or a step_XXXXXXXX directory"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint directory's name (``.replaced`` included); None for any other name."""
    match = STEP_NAME.fullmatch(path.name.removesuffix(REPLACED_SUFFIX))
    return int(match[1]) if match else None


def no_checkpoint_at(path: Path) -> str | None:
    """Why ``path`` is neither a checkpoint nor a directory of some or a run with some; None if it may be."""
    try:
        if not path.is_dir():
            return f"{path}: {'not a directory' if path.exists() else 'no such directory'}; {WHAT_TO_GIVE}"
        if step_of(path) is not None or (path / MANIFEST_FILE).exists():
            return None
        root = path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
        if any(step_of(entry) is not None for entry in root.iterdir()):
            return None
    except OSError as error:
        return f"{path}: {error.strerror or error}; {WHAT_TO_GIVE}"
    return f"{path} holds no checkpoint; {WHAT_TO_GIVE}"
