"""The checkpoints of a run: names, the ``latest`` pointer, which to resume from, how to delete one.

    root/step_00000100/     a checkpoint; the name appears by a rename once everything in it is durable
    root/step_00000200.tmp/ one being written, or what a killed job left; never read, swept by the next job
    root/latest             a text file with the newest checkpoint's name, replaced by a rename

A directory with a step name is a *candidate*; only its manifest says whether it is good. Deleting renames to
``.tmp`` first, so a kill in the middle leaves no half checkpoint under a step name. Symbolic links are never
followed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoGoodCheckpointError,
    explain_os_error,
    shorten,
)
from fp8train.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    Verify,
    is_complete,
    read_manifest,
    strays,
    verify_checkpoint,
)
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.resumed_from import ABANDONED, RECORD_FILE, carried_out, origin, to_be_moved
from fp8train.checkpoint.visibility import LOCAL, View, await_all
from fp8train.config import places
from fp8train.files import TMP_SUFFIX, fsync_dir, is_real_dir, is_real_file, remove, replace_file

if TYPE_CHECKING:
    import torch.distributed as dist

POINTER_FILE = "latest"
CHECKPOINTS_DIR = places.CHECKPOINTS_DIR
REPLACED_SUFFIX = places.REPLACED_SUFFIX
step_of = places.step_of

_logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint: eight digits, more when needed."""
    return f"step_{step:08d}"


def write_pointer(root: Path, target: Path) -> None:
    """Make the file ``latest`` name ``target``, atomically and durably."""
    replace_file(root / POINTER_FILE, f"{target.name}\n".encode())


def read_pointer(root: Path) -> Path | None:
    """The checkpoint that ``latest`` names, or None if it is absent, garbage or names nothing there."""
    path = root / POINTER_FILE
    if not is_real_file(path):
        return None
    with path.open("rb") as stream:
        name = stream.read(64).decode("ascii", errors="replace").strip()
    target = root / name
    return target if places.STEP_NAME.fullmatch(name) and is_real_dir(target) else None


def candidates(root: Path) -> list[Path]:
    """Checkpoint directories under ``root``, in the order to try them.

    That is the pointer's target, then older steps from new to old, then newer ones (saved but not yet pointed
    at when the job died). Without a usable pointer: all, from new to old, with a warning. What a rollback is
    about to abandon is not among them.
    """
    ordered = _in_order(root)
    if ordered and read_pointer(root) is None:
        state = "missing" if not (root / POINTER_FILE).exists() else "unusable"
        _logger.warning(
            "%s is %s; falling back to the newest complete checkpoint, %s at best",
            root / POINTER_FILE,
            state,
            ordered[0].name,
        )
    return ordered


def _in_order(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    hidden = to_be_moved(root)
    found = {
        path.name: path
        for path in root.iterdir()
        if step_of(path) is not None and path.name not in hidden and is_real_dir(path)
    }
    kept = [p for p in found.values() if not (p.name.endswith(REPLACED_SUFFIX) and p.stem in found)]
    ordered = sorted(kept, key=lambda path: (-(step_of(path) or 0), path.name))
    target = read_pointer(root)
    if target is None or target.name in hidden:
        return ordered
    newest = step_of(target) or 0
    return sorted(ordered, key=lambda path: (step_of(path) or 0) > newest)


def find_checkpoint(
    root: Path,
    resume: str,
    *,
    group: dist.ProcessGroup | None = None,
    verify: Verify = "full",
    key: str = "resume",
    view: View = LOCAL,
) -> Path | None:
    """The verified checkpoint to continue from; collective over ``group``, the same answer on every rank.

    ``resume``: ``never`` gives None. ``auto`` gives the first good one of :func:`candidates` of ``root``,
    warning about each damaged one it passes over; where there is none at all, the checkpoint of another run
    that this one began at, or None. Anything else is a path: a step directory is taken or refused; a
    checkpoints directory or a run directory is searched like ``auto``, but must hold a checkpoint. A path
    that the run continues from already means ``auto``. ``key`` is what messages call ``resume``; ``view``:
    how long to wait until every rank sees it.

    Raises :class:`CheckpointError` when a path holds no checkpoint, :class:`OtherFormatError` when another
    version of this program wrote one that would be taken, passed over or replaced later, and
    :class:`NoGoodCheckpointError` when checkpoints exist but none is good: starting afresh over them is not
    ours to decide.
    """
    if resume == "never":
        return None
    ranks = Ranks(group)
    if resume != "auto" and not (key == "resume" and ranks.first(lambda: carried_out(root, resume))):
        given = Path(resume)
        searched = ranks.first(lambda: _to_search(given, key))
        if searched is None:
            _await_and_verify(given, ranks, verify, view, verify_given)
            return given
        root = searched
    failures: list[str] = []
    found = ranks.first(lambda: candidates(root))
    for path in found:
        try:
            _await_and_verify(path, ranks, verify, view, _verify_in_turn)
        except CorruptCheckpointError as error:
            failures.append(str(error).replace(":\n ", ":").split("\n", 1)[0])
            if ranks.is_first:
                _logger.warning("SKIPPED a damaged checkpoint, trying the one before it: %s", error)
            continue
        ranks.first(partial(_refuse_other_formats, found, path))
        return path
    if failures:
        raise NoGoodCheckpointError(
            f"no checkpoint in {root} is usable:\n{shorten(failures, limit=2)}\nrestore one from a copy"
        )
    began_at = ranks.first(lambda: origin(root))
    if began_at is not None:
        _await_and_verify(began_at, ranks, verify, view, verify_given)
    return began_at


def _await_and_verify(
    path: Path, ranks: Ranks, verify: Verify, view: View, check: Callable[[Path, Ranks, Verify], None]
) -> None:
    """Check a checkpoint that every rank sees, and what it says of itself."""
    await_all(path / MANIFEST_FILE, ranks, view)
    check(path, ranks, verify)


def _verify_in_turn(path: Path, ranks: Ranks, mode: Verify) -> None:
    manifest = verify_checkpoint(path, ranks=ranks, mode=mode)
    ranks.first(lambda: _check_description(path, manifest))


def _check_description(path: Path, manifest: Manifest) -> None:
    step, _ = read_meta_file(path)
    if step != manifest.step or step_of(path) not in (None, step):
        raise CorruptCheckpointError(
            f"{path}: is the checkpoint of step {manifest.step} (meta: {step}), not of its name"
        )
    for name in strays(path, manifest):
        _logger.warning("%s is not part of the checkpoint and is not read", path / name)


def _refuse_other_formats(found: list[Path], chosen: Path) -> None:
    """Later checkpoints of another format would be replaced when the run comes there."""
    for path in found:
        if (step_of(path) or 0) > (step_of(chosen) or 0):
            with suppress(CorruptCheckpointError):
                read_manifest(path)


def likely_checkpoint(root: Path, resume: str, *, key: str = "resume") -> Path | None:
    """What :func:`find_checkpoint` will most likely give, for a look before a run: files are listed and not
    read, damage is passed over without a word, and None is given where nothing looks good.

    Raises :class:`CheckpointError` when an explicit path holds no checkpoint, or one of another format.
    """
    if resume == "never":
        return None
    if resume != "auto" and not (key == "resume" and carried_out(root, resume)):
        searched = _to_search(Path(resume), key)
        if searched is None:
            return Path(resume)
        root = searched
    found = next((path for path in _in_order(root) if is_complete(path)), None)
    return origin(root) if found is None else found


def verify_given(path: Path, ranks: Ranks, mode: Verify) -> None:
    """Check the one checkpoint that someone named; a damaged one is an error that says what else to name."""
    try:
        _verify_in_turn(path, ranks, mode)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(
            f"{error}\ngive an older one, or the run directory for its newest good one"
        ) from None


def _to_search(path: Path, key: str) -> Path | None:
    """The checkpoints directory that an explicit path stands for; None if it is a checkpoint itself."""
    if path.is_symlink() and (step_of(path) is not None or (path / MANIFEST_FILE).exists()):
        raise CheckpointError(
            f"`{key}`: {path} is a symbolic link; give the directory itself: {path.resolve()}"
        )
    if path.name.endswith(TMP_SUFFIX):
        raise CheckpointError(
            f"`{key}`: {path} is an unfinished save; choose a complete step_XXXXXXXX directory"
        )
    if ABANDONED in path.name:
        own = path.name.partition(ABANDONED)[0]
        raise CheckpointError(
            f"`{key}`: {path} was abandoned when its run went back; to take it up again, rename it to {own} "
            "(move another one out of its way), and give that"
        )
    if path.is_dir():
        if (path / MANIFEST_FILE).exists() or step_of(path) is not None:
            return None
        for root in (path, path / CHECKPOINTS_DIR):
            if root.is_dir() and any(step_of(entry) is not None for entry in root.iterdir()):
                return root
    state = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"`{key}`: {path} {state}; give a step_XXXXXXXX, a checkpoints or a run directory"
        + (", or use `resume`=auto to start fresh where there is none" if key == "resume" else "")
    )


def sweep_leftovers(root: Path) -> list[str]:
    """Delete what killed saves and deletions left under ``root``; returns the names.

    Only the job that owns the run directory may call this: a ``.tmp`` directory may be another job's save in
    progress. A replaced checkpoint whose replacement never arrived gets its name back.
    """
    swept: list[str] = []
    if not root.is_dir():
        return swept
    for path in sorted(root.iterdir()):
        plain = path.name.removesuffix(TMP_SUFFIX)
        ours = tuple(f".{name}." for name in (POINTER_FILE, RECORD_FILE))
        if plain != path.name and (step_of(Path(plain)) is not None or plain.startswith(ours)):
            _sweep(path, remove, swept)
    for path in sorted(root.glob(f"step_*{REPLACED_SUFFIX}")):
        original = path.with_name(path.name.removesuffix(REPLACED_SUFFIX))
        if not is_real_dir(path):
            continue
        if is_real_dir(original):
            _sweep(path, delete_checkpoint, swept)
        else:
            path.rename(original)
    fsync_dir(root)
    return swept


def _sweep(path: Path, delete: Callable[[Path], None], swept: list[str]) -> None:
    """Rubbish that cannot be removed is no reason not to train."""
    try:
        delete(path)
    except OSError as error:
        _logger.warning("could not remove %s, left by an earlier job: %s", path, explain_os_error(error))
    else:
        swept.append(path.name)


def delete_checkpoint(path: Path) -> None:
    """Delete one checkpoint so that a kill at any moment leaves no half of it under its name."""
    assert is_real_dir(path), f"{path} is not a directory"
    assert step_of(path) is not None, f"{path} is not named like a checkpoint"
    doomed = path.with_name(f"{path.name}{TMP_SUFFIX}")
    remove(doomed)
    path.rename(doomed)
    remove(doomed)
