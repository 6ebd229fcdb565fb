"""Which of a run's old checkpoints are deleted once a newer one is safe.

A checkpoint stays if any rule wants it: one of the last k, a step that is a multiple of n, one of the k with
the lowest validation loss, the newest whose states are known to be finite, or the pointer's target. What is
incomplete, linked, later, abandoned by a rollback, or of another version's format is not ours to delete.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8train.checkpoint.catalog import delete_checkpoint, read_pointer, step_of
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CheckpointError, CorruptCheckpointError, explain_os_error
from fp8train.checkpoint.manifest import read_manifest
from fp8train.files import is_real_dir

EVAL_LOSS = "eval_loss"
"""Key of a checkpoint's description: validation loss in nats per token, measured at the step of the save."""
FINITE = "finite"
"""Likewise: True if every master weight and moment was looked at, and none is NaN or infinite."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Rules of which checkpoints to keep."""

    keep_last: int
    """So many of the newest, at least 1."""
    keep_every: int = 0
    """Steps that are multiples of this, for ever; 0: none."""
    keep_best: int = 0
    """So many of those with the lowest finite validation loss; the newer one of equals."""

    def __post_init__(self) -> None:
        assert self.keep_last >= 1 and self.keep_every >= 0 and self.keep_best >= 0, self


def retain(root: Path, rules: Retention, *, newest: int) -> list[Path]:
    """Delete the complete checkpoints up to step ``newest`` that no rule keeps; returns what was deleted.

    Never touched: the pointer's target, the newest one known to be finite, incomplete directories, symbolic
    links, other formats, and later steps. A deletion that fails only warns.
    """
    complete = [path for path in root.iterdir() if is_real_dir(path) and _is_complete(path, newest)]
    complete.sort(key=lambda path: step_of(path) or 0, reverse=True)
    kept = {read_pointer(root), *complete[: rules.keep_last]}
    if rules.keep_every:
        kept.update(path for path in complete if (step_of(path) or 0) % rules.keep_every == 0)
    if rules.keep_best:
        kept.update(_best(complete, rules.keep_best))
    kept.add(next((path for path in complete if _meta(path).get(FINITE) is True), None))
    deleted: list[Path] = []
    for path in complete:
        if path in kept:
            continue
        if delete_old(path):
            deleted.append(path)
    return deleted


def delete_old(path: Path) -> bool:
    """Delete a checkpoint that nobody needs; a failure only warns. Returns whether it is gone."""
    try:
        delete_checkpoint(path)
    except OSError as error:
        _logger.warning("could not delete the old checkpoint %s: %s", path, explain_os_error(error))
        return False
    return True


def _best(newest_first: list[Path], count: int) -> list[Path]:
    losses = {path: loss for path in newest_first if (loss := _eval_loss(path)) is not None}
    return sorted(losses, key=lambda path: losses[path])[:count]


def _eval_loss(path: Path) -> float | None:
    """The loss recorded in a checkpoint; None where none was measured or it is not a finite number."""
    loss = _meta(path).get(EVAL_LOSS)
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _meta(path: Path) -> dict[str, Any]:
    try:
        return read_meta_file(path)[1]
    except CorruptCheckpointError:
        return {}


def _is_complete(path: Path, newest: int) -> bool:
    step = step_of(path)
    if step is None or step > newest:
        return False
    try:
        return read_manifest(path).step == step
    except CheckpointError:
        return False
