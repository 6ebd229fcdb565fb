"""Which of a run's old checkpoints are deleted once a newer one is safe.

A checkpoint stays if any rule wants it: one of the last k, a step that is a multiple of n, one of the k with
the lowest validation loss, or the pointer's target. Incomplete or linked directories and later steps are not
ours to delete.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

from fp8train.checkpoint.catalog import delete_checkpoint, read_pointer, step_of
from fp8train.checkpoint.errors import CorruptCheckpointError, explain_os_error
from fp8train.checkpoint.manifest import read_manifest, read_meta_file
from fp8train.files import is_real_dir

EVAL_LOSS = "eval_loss"
"""Key of a checkpoint's description: validation loss in nats per token, measured at the step of the save."""

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

    Never touched: the pointer's target, incomplete directories, symbolic links, and later steps (they belong
    to a continuation that was rolled back, and are replaced when the run reaches them). A deletion that fails
    only warns.
    """
    complete = [path for path in root.iterdir() if is_real_dir(path) and _is_complete(path, newest)]
    complete.sort(key=lambda path: step_of(path) or 0, reverse=True)
    kept = {read_pointer(root), *complete[: rules.keep_last]}
    if rules.keep_every:
        kept.update(path for path in complete if (step_of(path) or 0) % rules.keep_every == 0)
    if rules.keep_best:
        kept.update(_best(complete, rules.keep_best))
    deleted: list[Path] = []
    for path in complete:
        if path in kept:
            continue
        try:
            delete_checkpoint(path)
        except OSError as error:
            _logger.warning("could not delete the old checkpoint %s: %s", path, explain_os_error(error))
        else:
            deleted.append(path)
    return deleted


def _best(newest_first: list[Path], count: int) -> list[Path]:
    losses = {path: loss for path in newest_first if (loss := _eval_loss(path)) is not None}
    return sorted(losses, key=lambda path: losses[path])[:count]


def _eval_loss(path: Path) -> float | None:
    """The loss recorded in a checkpoint; None where none was measured or it is not a finite number."""
    try:
        loss = read_meta_file(path)[1].get(EVAL_LOSS)
    except CorruptCheckpointError:
        return None
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _is_complete(path: Path, newest: int) -> bool:
    step = step_of(path)
    if step is None or step > newest:
        return False
    try:
        return read_manifest(path).step == step
    except CorruptCheckpointError:
        return False
