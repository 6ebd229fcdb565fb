"""The record of ``checkpoint.resume=PATH``: what a run was told to continue from.

A path is an order to be carried out once. A scheduler that starts the same command again must not go back
again, and a job that comes with ``auto`` must go on from there although nothing has been saved since. So the
order is written down, durably, before anything is cut or trained: ``checkpoints/resumed_from.json``.

Going back within a run abandons the later checkpoints. They are not deleted: they get another name
(``step_00000012.abandoned``), under which nothing looks for them. The record lists these moves before the
first of them; while they are not ``done``, whoever looks for checkpoints passes over what is to be moved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8train.checkpoint.errors import CheckpointError, explain_os_error
from fp8train.checkpoint.manifest import first_problem
from fp8train.files import is_real_file, replace_file

RECORD_FILE = "resumed_from.json"
ABANDONED = ".abandoned"
"""After a step's name: a checkpoint that its run went back behind."""


class ResumedFrom(BaseModel):
    """One order to continue from a path."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    asked: str
    """The path that was given; inside the checkpoints directory relative to it, else absolute."""
    checkpoint: str
    """The checkpoint that it stood for, likewise."""
    step: Annotated[int, Field(ge=0)]
    """Of that checkpoint."""
    moves: list[tuple[str, str]] = Field(default=[], strict=False)
    """Names of abandoned checkpoints and their new ones, in the order of the renames."""
    done: bool
    """Whether the moves are made and the pointer names the checkpoint."""


def place(root: Path, path: Path) -> str:
    """How a record names ``path``: a run directory may be moved as a whole."""
    resolved, own = path.resolve(), root.resolve()
    return str(resolved.relative_to(own) if resolved.is_relative_to(own) else resolved)


def read_record(root: Path) -> ResumedFrom | None:
    """The last order of the run whose checkpoints lie in ``root``; None if it never had one.

    Raises:
        CheckpointError: the file is not what was written.
    """
    path = root / RECORD_FILE
    if not is_real_file(path):
        return None
    try:
        return ResumedFrom.model_validate_json(path.read_bytes())
    except OSError as error:
        problem = f"unreadable: {explain_os_error(error)}"
    except ValidationError as error:
        problem = f"damaged: {first_problem(error)}"
    raise CheckpointError(
        f"{path}: {problem}; it says what `resume`=PATH this run was given. Delete it to continue from the "
        "newest checkpoint"
    )


def write_record(root: Path, record: ResumedFrom) -> None:
    """Replace the record, durably."""
    replace_file(root / RECORD_FILE, f"{record.model_dump_json(indent=1)}\n".encode())


def carried_out(root: Path, resume: str) -> bool:
    """Whether ``resume`` is the path that this run continues from already."""
    if resume in ("never", "auto"):
        return False
    record = read_record(root)
    return record is not None and record.asked == place(root, Path(resume))


def to_be_moved(root: Path) -> frozenset[str]:
    """Names in ``root`` that an unfinished order abandons."""
    record = read_record(root)
    if record is None or record.done:
        return frozenset()
    return frozenset(old for old, _ in record.moves)


def origin(root: Path) -> Path | None:
    """The checkpoint of another run that this one began at, if it did."""
    record = read_record(root)
    return Path(record.checkpoint) if record is not None and os.path.isabs(record.checkpoint) else None
