"""Who may write to a run directory: the lock, and what happens to a run that is already there.

The lock is ``flock`` on ``run.lock``. The kernel releases it however the job dies, so it is never stale; the
file's content only serves the message to the second job. The file itself stays: deleting it would let two
jobs lock two files.

A run directory is known by its ``status.json``, the first file written to a new one. Anything else that is
not empty is refused, so that a wrong ``run.dir`` cannot cost someone's data. A job that failed before its
first step (a dataset that is not there, say) leaves no run: the next one takes the directory as a new one.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any, Literal

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR, POINTER_FILE, step_of
from fp8train.checkpoint.errors import explain_os_error
from fp8train.checkpoint.resumed_from import ABANDONED, RECORD_FILE, carried_out
from fp8train.config.errors import UserError
from fp8train.files import TMP_SUFFIX, is_real_dir, is_real_file, remove, replace_file
from fp8train.json_text import parse_object, read_object

LOCK_FILE = "run.lock"
STATUS_FILE = "status.json"
FAILURES = Path("logs", "failures")
"""Where ranks of the present job leave why they failed."""
LAUNCH_DIR = "launch"
"""What ``fp8train launch`` leaves in a run directory, before there is a run and whatever becomes of it."""
_OWN_FILES = (
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "events.jsonl",
    "casts.jsonl",
    "inference_casts.jsonl",
    "report.html",
    "STOP",
    "tokenizer.model",
    "tokenizer.json",
)
HEARTBEATS_DIR = "heartbeats"
FAULTS_DIR = "faults"
_OWN_DIRS = ("logs", "tb", "wandb", "report", "profile", HEARTBEATS_DIR, FAULTS_DIR)
_logger = logging.getLogger(__name__)


class RunDirError(UserError):
    """The run directory cannot be used: not writable, in use, or holding something that must not be
    overwritten.
    """


class RunDirGoneError(RunDirError):
    """The run directory was deleted or replaced under a live job: nothing may be written there any more."""


def claim(base: Path, name: str, *, resume: str, overwrite: bool) -> tuple[int, bool]:
    """Create, continue or overwrite ``base/name`` and lock it, on rank 0.

    Returns the locked file and whether a run is continued. Raises :class:`RunDirError`; see ``RunDir.open``.
    """
    path = base / name
    _check_settings(name, resume=resume, overwrite=overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _holds_run(path)  # refuses someone's folder before a lock file is put there
        lock_fd = _lock(path)
        try:
            continued = _holds_run(path) and _settle(path, resume=resume, overwrite=overwrite)
            _furnish(path, fresh=not continued)
        except BaseException:
            os.close(lock_fd)
            raise
    except OSError as error:
        raise RunDirError(
            f"run directory {path} cannot be written ({explain_os_error(error)}); "
            "set run.dir to a folder you can write to"
        ) from error
    return lock_fd, continued


def check_claim(base: Path, name: str, *, resume: str, overwrite: bool) -> bool:
    """Whether :func:`claim` would continue a run. Raises what it would raise as far as looking shows: nothing
    is written, and whether another job is at work there is not asked.
    """
    path = base / name
    _check_settings(name, resume=resume, overwrite=overwrite)
    try:
        return path.is_dir() and _holds_run(path) and _decide(path, resume, overwrite=overwrite) == "continue"
    except OSError as error:
        raise RunDirError(
            f"run directory {path} cannot be read ({explain_os_error(error)}); "
            "set run.dir to a folder of yours"
        ) from error


def _check_settings(name: str, *, resume: str, overwrite: bool) -> None:
    if Path(name).name != name or name in ("", ".", ".."):
        raise RunDirError(f"run.name: {name!r} must be a plain name, not a path")
    if overwrite and resume == "auto":
        raise RunDirError(
            "run.overwrite=true deletes what checkpoint.resume=auto would continue from; set one of them"
        )


def _furnish(path: Path, *, fresh: bool) -> None:
    for leftover in path.glob(f".*{TMP_SUFFIX}"):  # of a replacement that was killed
        if _is_own_tmp(leftover.name):
            remove(leftover)
    # What an earlier job ended with must not be taken for this one's end. Where it had come to stays.
    step = 0 if fresh else recorded_step(path)
    status = {"state": "running", "step": step, "reason": "", "exit_code": None}
    remove(path / FAILURES)
    replace_file(path / STATUS_FILE, (json.dumps(status, indent=2) + "\n").encode())
    remove(path / HEARTBEATS_DIR)  # an earlier job's would be taken for this one's
    for folder in (CHECKPOINTS_DIR, "logs", FAILURES, "tb", HEARTBEATS_DIR):
        (path / folder).mkdir(exist_ok=True)


def load_status(path: Path) -> dict[str, Any]:
    """The ``status.json`` of the run directory ``path``, of which ``state`` is text and ``step`` a count.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    status = read_object(path / STATUS_FILE)
    step = status.get("step")
    if not isinstance(status.get("state"), str) or not isinstance(step, int) or not 0 <= step < 2**63:
        raise ValueError("no state and step in it")
    return status


def recorded_step(path: Path) -> int:
    """Steps done as the ``status.json`` of ``path`` has them; 0 where it does not say."""
    try:
        return int(load_status(path)["step"])
    except (OSError, ValueError):
        return 0


def _is_own_tmp(name: str) -> bool:
    """Whether this is the temporary file of one of our own files: ``.status.json.1234.tmp``."""
    return name.endswith(TMP_SUFFIX) and any(
        name.startswith(f".{own}.") for own in (*_OWN_FILES, STATUS_FILE)
    )


def _holds_run(path: Path) -> bool:
    names = {entry.name for entry in path.iterdir() if not _is_own_tmp(entry.name)} - {LOCK_FILE, LAUNCH_DIR}
    if names and not is_real_file(path / STATUS_FILE):
        raise RunDirError(
            f"{path} is not empty and not a run directory (no {STATUS_FILE}; it holds "
            f"{', '.join(sorted(names)[:3])}); choose another run.name or run.dir"
        )
    return bool(names)


def _has_started(path: Path) -> bool:
    """Whether there is a run to continue or to lose; ``config.yaml`` is written when training begins."""
    checkpoints = path / CHECKPOINTS_DIR
    records = ("config.yaml", "metrics.jsonl")
    return any(os.path.lexists(path / name) for name in records) or (
        checkpoints.is_symlink() or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    )


def _lock(path: Path) -> int:
    """Take the lock or say who has it."""
    fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(fd, 4096, 0))
        os.close(fd)
        raise RunDirError(
            f"run directory {path} is in use by another job ({holder}); wait for it, "
            f"stop it with `touch {path}/STOP`, or choose another run.name"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(fd)
            raise
        _logger.warning(
            "%s: this file system has no locks; make sure that no other job uses this run directory", path
        )
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID")}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(owner).encode(), 0)
    return fd


def in_use(path: Path) -> bool:
    """Whether a live job holds the run directory ``path``."""
    try:
        fd = os.open(path / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(fd)
    return False


def taken_away(path: Path, lock_fd: int) -> str | None:
    """What has become of the run directory ``path`` under the job that holds ``lock_fd``: None while it is
    there. A lock file that somebody tidied away does not count, nor does a disk that does not answer."""
    try:
        if os.path.samestat(os.stat(path / LOCK_FILE, follow_symlinks=False), os.fstat(lock_fd)):
            return None
        return f"run directory {path} was replaced while this run was using it; another job may be there now"
    except FileNotFoundError:
        if (path / STATUS_FILE).exists():
            return None
        return f"run directory {path} was deleted while this run was using it, and its checkpoints with it"
    except OSError:
        return None


def _holder(data: bytes) -> str:
    try:
        owner = parse_object(data)
        job = f", Slurm job {owner['job_id']}" if owner["job_id"] else ""
        return f"host {owner['host']}, pid {owner['pid']}{job}"
    except (ValueError, LookupError, TypeError):
        return "it is just starting"


def _settle(path: Path, *, resume: str, overwrite: bool) -> bool:
    """Prepare a directory that a job has used; whether its run is continued."""
    decision = _decide(path, resume, overwrite=overwrite)
    if decision == "overwrite":
        _delete_run(path)
        return False
    remove(path / "STOP")  # it was meant for the job that is gone
    return decision == "continue"


def _decide(path: Path, resume: str, *, overwrite: bool) -> Literal["overwrite", "begin", "continue"]:
    """What becomes of a directory that a job has used, if it is not refused."""
    inside = resume not in ("never", "auto") and Path(resume).resolve().is_relative_to(path.resolve())
    if overwrite:
        if inside:
            raise RunDirError(
                f"run.overwrite=true would delete the checkpoint to resume from ({resume}); set one of them"
            )
        return "overwrite"
    if not _has_started(path):
        return "begin"
    if resume == "auto" or inside or carried_out(path / CHECKPOINTS_DIR, resume):
        return "continue"
    raise RunDirError(
        f"{path} already holds a run. Three ways on:\n"
        "  checkpoint.resume=auto   continue it from its newest checkpoint\n"
        "  run.overwrite=true       delete it and start afresh\n"
        "  run.name=OTHER           keep it and start another"
    )


def _delete_run(path: Path) -> None:
    """Delete what a run makes; everything else stays. ``status.json`` is left: a killed deletion can then be
    repeated.
    """
    if path.is_symlink():
        raise RunDirError(
            f"run.overwrite: {path} is a symbolic link; delete the run in {path.resolve()} yourself"
        )
    checkpoints = path / CHECKPOINTS_DIR
    if is_real_dir(checkpoints):
        for entry in list(checkpoints.iterdir()):
            step = step_of(Path(entry.name.removesuffix(TMP_SUFFIX).partition(ABANDONED)[0]))
            if entry.name in (POINTER_FILE, RECORD_FILE) or step is not None:
                remove(entry)
    elif checkpoints.is_symlink():
        remove(checkpoints)
    for name in (*_OWN_DIRS, *_OWN_FILES):
        remove(path / name)
