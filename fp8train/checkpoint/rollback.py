"""Carries out ``checkpoint.resume=PATH``, so that a kill at any moment leaves the order given or not given.

The steps: write the record; rename what is abandoned; move the pointer; mark the record as done. Before the
first nothing has changed. After it :func:`complete` does what is left, and may be called as often as one
likes. Nothing is deleted.
"""

from __future__ import annotations

import logging
import os
from itertools import count
from pathlib import Path

from fp8train.checkpoint.catalog import step_of, write_pointer
from fp8train.checkpoint.resumed_from import (
    ABANDONED,
    RECORD_FILE,
    ResumedFrom,
    carried_out,
    place,
    read_record,
    write_record,
)
from fp8train.files import fsync_dir, is_real_dir

_logger = logging.getLogger(__name__)


def roll_back(root: Path, resume: str, checkpoint: Path, step: int) -> None:
    """Put on record that the run in ``root`` continues from ``checkpoint``, and abandon its later ones; on
    rank 0, before anything is cut or trained.

    Args:
        root: the run's checkpoints directory.
        resume: ``checkpoint.resume``; nothing happens unless it is a path that was not carried out yet.
        checkpoint: what it stands for.
        step: of that checkpoint.
    """
    given, own = Path(resume), checkpoint.resolve().parent == root.resolve()
    if resume in ("never", "auto") or carried_out(root, resume):
        return
    if own and given.resolve() != checkpoint.resolve():
        return  # the run itself: its newest checkpoint, as auto
    later = [
        path
        for path in sorted(root.iterdir())
        if is_real_dir(path) and (step_of(path) or 0) > step and path.resolve() != checkpoint.resolve()
    ]
    moves = [(path.name, _free_name(path)) for path in later]
    record = ResumedFrom(
        asked=place(root, given), checkpoint=place(root, checkpoint), step=step, moves=moves, done=False
    )
    write_record(root, record)
    complete(root)
    if moves:
        _logger.warning(
            "WENT BACK to %s; %d later checkpoint%s kept as %s%s: delete what you do not need",
            checkpoint,
            len(moves),
            "" if len(moves) == 1 else "s",
            root / moves[0][1],
            ", .." if moves[1:] else "",
        )


def _free_name(path: Path) -> str:
    names = (f"{path.name}{ABANDONED}{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(name for name in names if not os.path.lexists(path.with_name(name)))


def complete(root: Path) -> None:
    """Do what a killed job left of :func:`roll_back`; rank 0."""
    record = read_record(root)
    if record is None or record.done:
        return
    for old, new in record.moves:
        if is_real_dir(root / old) and not os.path.lexists(root / new):
            (root / old).rename(root / new)
    fsync_dir(root)
    if not os.path.isabs(record.checkpoint):
        write_pointer(root, root / record.checkpoint)
    write_record(root, record.model_copy(update={"done": True}))


def say_what_counts(root: Path, resume: str) -> None:
    """Tell who repeats an order, or means it, that the run goes on and does not go back again."""
    if carried_out(root, resume):
        _logger.warning(
            "`resume`=%s was carried out already: the run continues from its newest checkpoint. To go back "
            "there once more, delete %s first",
            resume,
            root / RECORD_FILE,
        )
