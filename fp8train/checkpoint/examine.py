"""``fp8train verify``: is every checkpoint of a run whole and readable?

More than a load checks: every file is hashed, the index is read (without running it) and compared with the
shards' sizes, the description is parsed, and the pointer must name a checkpoint. One line per checkpoint, so
that the output of a nightly job can be read and compared.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR, POINTER_FILE, read_pointer, step_of
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CheckpointError, CorruptCheckpointError, explain_os_error
from fp8train.checkpoint.manifest import MANIFEST_FILE, read_manifest, strays, verify_checkpoint
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.readback import check_index
from fp8train.checkpoint.resumed_from import ABANDONED, RECORD_FILE, to_be_moved
from fp8train.config.errors import UserError
from fp8train.config.places import WHAT_TO_GIVE, no_checkpoint_at
from fp8train.data.byte_progress import ByteProgress
from fp8train.files import TMP_SUFFIX, is_real_dir

_LARGE_BYTES = 1 << 28
"""From here on hashing takes seconds, and progress is shown."""

FAILED = 2
"""Exit status of ``fp8train verify`` when something is wrong."""


@dataclass(frozen=True)
class Examination:
    """What was found out about one checkpoint."""

    path: Path
    step: int | None
    """From its manifest, else its name."""
    num_files: int
    num_bytes: int
    """Of its files, as listed in its manifest; 0 without one."""
    seconds: float
    problem: str
    """What is wrong, in one line; empty if nothing is."""
    strays: tuple[str, ...] = ()
    """Files in it that are not part of it and harm nothing."""

    def __str__(self) -> str:
        step = "?" if self.step is None else self.step
        facts = f"step {step}, {self.num_files} files, {self.num_bytes:,} bytes, {self.seconds:.1f} s"
        beside = f" (not part of it: {', '.join(map(ascii, self.strays))})" if self.strays else ""
        return f"{self.path}: {facts}: {self.problem or 'ok'}{beside}"


def examine(path: Path) -> Examination:
    """Check one checkpoint completely; never raises for anything that its files or the disk can cause."""
    began = time.perf_counter()
    step, num_files, num_bytes, problem = step_of(path), 0, 0, ""
    beside: list[str] = []
    try:
        manifest = read_manifest(path)
        step, num_files = manifest.step, len(manifest.files) + 1
        listed = sum(entry.size for entry in manifest.files.values())
        num_bytes = listed + (path / MANIFEST_FILE).stat().st_size
        if num_bytes < _LARGE_BYTES:
            verify_checkpoint(path, ranks=Ranks(None))
        else:
            with ByteProgress(path.name, listed) as progress:
                verify_checkpoint(path, ranks=Ranks(None), on_bytes=progress.advance)
        if read_meta_file(path)[0] != step or step_of(path) not in (None, step):
            raise CorruptCheckpointError(f"{path}: is the checkpoint of step {step}, not of its name")
        check_index(path, manifest.files)
        beside = strays(path, manifest)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = explain_os_error(error)
    seconds, problem = time.perf_counter() - began, _one_line(problem, path)
    return Examination(path, step, num_files, num_bytes, seconds, problem, tuple(beside))


def _one_line(problem: str, path: Path) -> str:
    """Without the path, which stands before it."""
    return " ".join(problem.split()).removeprefix(f"{path}: ").replace(f"{path}/", "")


def verify_command(path: Path) -> int:
    """Examine the checkpoint at ``path``, or all of a checkpoints or run directory; print one line for each.

    Returns:
        0 if all are good, else :data:`FAILED`.

    Raises:
        CheckpointError: ``path`` holds no checkpoint.
    """
    root, found = _find(path)
    good = True
    for checkpoint in found:
        result = examine(checkpoint)
        good &= not result.problem
        print(result, flush=True)
    if root is not None:
        for leftover in sorted(root.glob(f"step_*{TMP_SUFFIX}")):
            print(f"{leftover}: unfinished save; the next job of this run removes it", flush=True)
        for abandoned in sorted(root.glob(f"step_*{ABANDONED}*")):
            print(f"{abandoned}: abandoned when the run went back; nothing reads it", flush=True)
        if hidden := to_be_moved(root):
            print(f"{root / RECORD_FILE}: {', '.join(sorted(hidden))} will be abandoned", flush=True)
        if read_pointer(root) is None:
            good = False
            print(
                f"{root / POINTER_FILE}: missing or names no checkpoint; a run takes the newest", flush=True
            )
    if not good:
        print("error: not all is well; a run passes over damaged checkpoints", file=sys.stderr)
    return 0 if good else FAILED


def _find(path: Path) -> tuple[Path | None, list[Path]]:
    """The checkpoints directory, if it is one or a run's, and the checkpoints."""
    if problem := no_checkpoint_at(path):
        raise CheckpointError(problem)
    if step_of(path) is not None or (path / MANIFEST_FILE).exists():
        return None, [path]
    root = path / CHECKPOINTS_DIR if is_real_dir(path / CHECKPOINTS_DIR) else path
    found = [entry for entry in root.iterdir() if step_of(entry) is not None]
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint; {WHAT_TO_GIVE}")
    return root, sorted(found, key=lambda entry: (step_of(entry) or 0, entry.name))
