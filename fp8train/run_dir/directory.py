"""The directory of one run: who may write there, what lies in it, and what a resumed run keeps.

    runs/NAME/  config.yaml  env.json  metrics.jsonl  events.jsonl  casts.jsonl  status.json
                logs/rank*.log  checkpoints/  tb/  wandb/  report/  report.html  STOP  run.lock

One live job holds the directory (see :mod:`fp8train.run_dir.claim`). Records are whole lines, and a
resumed run's equal an uninterrupted one's: lines after the resumed step are cut off.

Only rank 0 writes; on other ranks every method but :meth:`RunDir.log` and :meth:`RunDir.write_failure` does
nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR
from fp8train.checkpoint.errors import explain_os_error
from fp8train.checkpoint.ranks import Ranks
from fp8train.comm.failures import Failure, cause, failure_from
from fp8train.files import is_real_file, replace_file
from fp8train.json_text import records
from fp8train.run_dir.claim import STATUS_FILE, claim, in_use, read_status, recorded_step

if TYPE_CHECKING:
    import torch.distributed as dist

RunState = Literal["running", "completed", "stopped", "failed", "interrupted"]

_STREAMS = ("metrics.jsonl", "events.jsonl", "casts.jsonl")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDir:
    """An opened run directory. Rank 0 holds its lock until :meth:`close` or the end of the process."""

    path: Path
    """The directory."""
    rank: int
    """This process's rank; only 0 writes records."""
    continued: bool
    """Whether it already held a run."""
    lock_fd: int | None
    """Rank 0's open lock file."""

    @classmethod
    def open(
        cls, base: str | Path, name: str, *, resume: str, overwrite: bool, group: dist.ProcessGroup | None
    ) -> RunDir:
        """Create, continue or overwrite ``base/name`` and lock it; collective over ``group``.

        ``resume`` is ``checkpoint.resume`` (``never``, ``auto`` or a path), ``overwrite`` is
        ``run.overwrite``. Raises :class:`RunDirError` on every rank when the directory is not writable, in
        use by another job, not a run directory, or holds a run that these settings neither continue nor
        overwrite.
        """
        ranks = Ranks(group)
        lock_fd: int | None = None

        def prepare() -> bool:
            nonlocal lock_fd
            lock_fd, continued = claim(Path(base), name, resume=resume, overwrite=overwrite)
            return continued

        continued = ranks.first(prepare)
        run = cls(Path(base) / name, ranks.rank, continued, lock_fd)
        ranks.agree(lambda: run.rank_log.touch())
        return run

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.path / CHECKPOINTS_DIR

    @property
    def config_file(self) -> Path:
        """The resolved configuration; before :meth:`write_description`, a continued run's previous one."""
        return self.path / "config.yaml"

    @property
    def tensorboard(self) -> Path:
        """The directory of TensorBoard's event files."""
        return self.path / "tb"

    @property
    def stop_file(self) -> Path:
        """The file ``STOP``: creating it asks the run to save and exit."""
        return self.path / "STOP"

    @property
    def rank_log(self) -> Path:
        """The text log of this rank."""
        return self.path / "logs" / f"rank{self.rank}.log"

    def write_description(self, config_text: str, env: Mapping[str, Any]) -> None:
        """Write ``config.yaml`` (resolved, as text) and ``env.json``."""
        if self.rank == 0:
            replace_file(self.config_file, config_text.encode())
            replace_file(self.path / "env.json", _pretty(env))

    def write_status(
        self, state: RunState, *, step: int, reason: str = "", exit_code: int | None = None
    ) -> None:
        """Replace ``status.json`` atomically. ``reason`` says why the run ended; ``exit_code`` is its exit
        status then.
        """
        if self.rank == 0:
            write_status(self.path, state, step=step, reason=reason, exit_code=exit_code)

    def write_failure(self, failure: Failure, *, step: int) -> None:
        """Write why this rank failed to its log and, unless another one's failure explains it, to
        ``status.json``, whichever rank it is. A disk that refuses it is told of; nothing is raised.
        """
        try:
            self.log(failure.traceback or f"error: {failure.message}")
            write_failure(self.path, failure, step=step)
        except OSError as error:
            _logger.warning("%s could not be written: %s", STATUS_FILE, explain_os_error(error))

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; ``record`` needs an integer ``step``. NaN and infinity are
        kept.
        """
        assert isinstance(record["step"], int)
        if self.rank == 0:
            self._append(_STREAMS[0], record)

    def log_casts(self, step: int, site: str, values: Mapping[str, Any]) -> None:
        """Append one cast site's statistics to ``casts.jsonl``."""
        if self.rank == 0:
            self._append(_STREAMS[2], {"step": step, "site": site, **values})

    def log_event(self, kind: str, *, step: int, **fields: Any) -> None:
        """Append one line to ``events.jsonl``: what happened (``kind``), when, after which step, with any
        JSON fields.
        """
        if self.rank == 0:
            self._append(_STREAMS[1], {"time": time.time(), "step": step, "kind": kind, **fields})

    def log(self, text: str) -> None:
        """Append lines to this rank's log, each with the time (UTC); the only method that every rank may
        write with.
        """
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = "".join(f"{stamp} {line}\n" for line in text.splitlines())
        _append_whole(self.rank_log, lines.encode(errors="backslashreplace"))

    def truncate_after(self, step: int | None) -> None:
        """Cut records after ``step`` (all of them for None: no checkpoint was found) from metrics and events,
        atomically.

        A last line that a kill left unfinished goes too, and lines that no one can read, with a warning.
        """
        if self.rank != 0:
            return
        for name in _STREAMS:
            path = self.path / name
            if not is_real_file(path):
                continue
            kept, unreadable = [], 0
            for line, record in records(path):
                at = None if record is None else record.get("step")
                if not isinstance(at, int):
                    unreadable += line.endswith(b"\n") or not line
                elif step is not None and at <= step:
                    kept.append(line)
            if unreadable:
                _logger.warning("%s: %d unreadable line(s) left out", path, unreadable)
            replace_file(path, b"".join(kept))

    def clear_stop(self) -> None:
        """Remove ``STOP`` once it is honoured, so that the resumed run goes on."""
        if self.rank == 0:
            self.stop_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the directory for other jobs."""
        if self.lock_fd is not None:
            os.close(self.lock_fd)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        _append_whole(self.path / name, (json.dumps(record) + "\n").encode())


def write_status(
    path: Path, state: RunState, *, step: int, reason: str = "", exit_code: int | None = None, **more: Any
) -> None:
    """Replace the ``status.json`` of the run directory ``path``; ``more`` are further fields."""
    record = {"state": state, "step": step, "reason": reason, "exit_code": exit_code, "time": time.time()}
    replace_file(path / STATUS_FILE, _pretty(record | more))


def write_failure(path: Path, failure: Failure, *, step: int) -> None:
    """Make ``status.json`` say why a job failed, unless it names a failure that explains this one."""
    first = read_failure(path)
    if first is not None and cause((first, failure)) is first:
        return
    write_status(
        path,
        "failed",
        step=step,
        reason=failure.message.splitlines()[0],
        message=failure.message,
        exit_code=failure.exit_status,
        rank=failure.rank,
        peers_lost=failure.peers_lost,
    )


def amend_failure(path: Path, failure: Failure) -> None:
    """Write, for ranks that were killed, why the job in the run directory ``path`` failed; not if another job
    has taken it by now. Never raises.
    """
    with suppress(OSError, ValueError):
        if read_status(path)["state"] in ("running", "failed") and not in_use(path):
            write_failure(path, failure, step=recorded_step(path))


def read_failure(path: Path) -> Failure | None:
    """The failure that ``status.json`` tells of."""
    try:
        record = read_status(path)
        if record["state"] != "failed":
            return None
        names = ("rank", "message", "peers_lost", "time")
        return failure_from({name: record[name] for name in names} | {"exit_status": record["exit_code"]})
    except (OSError, ValueError, LookupError):
        return None


def _pretty(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(record), indent=2) + "\n").encode()


def _append_whole(path: Path, data: bytes) -> None:
    """Append ``data`` in one write, whole or not at all. A full disk loses the line with a warning: training
    goes on.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, "short write", str(path))
        finally:
            os.close(fd)
    except OSError as error:
        _logger.warning("LOST a line of %s: %s", path, explain_os_error(error))
