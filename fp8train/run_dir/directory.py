"""The directory of one run: who may write there, what lies in it, and what a resumed run keeps.

    runs/NAME/  config.yaml  env.json  metrics.jsonl  events.jsonl  casts.jsonl  status.json
                logs/rank*.log  heartbeats/  checkpoints/  tb/  wandb/  report/  profile/  launch/
                report.html  STOP  run.lock

One live job holds the directory (see :mod:`fp8train.run_dir.claim`). Records are whole lines, and a
resumed run's equal an uninterrupted one's: lines after the resumed step are cut off.

A disk that refuses a line or the status costs that line, with a warning, and never the run; what a run needs
before its first step is an error then. So reporting how a run ended does not depend on its disk.

Only rank 0 writes; on other ranks every method but :meth:`RunDir.log` and :meth:`RunDir.write_failure` does
nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8train.checkpoint.catalog import CHECKPOINTS_DIR
from fp8train.checkpoint.errors import explain_os_error
from fp8train.checkpoint.ranks import Ranks
from fp8train.comm.failures import Failure, describe
from fp8train.files import append_file, is_real_file, remove, replace_file
from fp8train.json_text import records
from fp8train.run_dir.claim import RunDirError, claim, recorded_step, taken_away
from fp8train.run_dir.failed import RunState, pretty, write_failure, write_status

if TYPE_CHECKING:
    import torch.distributed as dist

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
    _lost: dict[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Lines that could not be written since the last one that could, by file."""

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

        try:
            continued = ranks.first(prepare)
            run = cls(Path(base) / name, ranks.rank, continued, lock_fd)
            ranks.agree(lambda: run.rank_log.touch())
        except BaseException as error:
            if lock_fd is not None:  # the status says by now that the run is on
                write_failure(Path(base) / name, describe(error), step=recorded_step(Path(base) / name))
                os.close(lock_fd)
            raise
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
        """Write ``config.yaml`` (resolved, as text) and ``env.json``. Raises :class:`RunDirError` where the
        disk refuses.
        """
        if self.rank == 0:
            with self._needed():
                replace_file(self.config_file, config_text.encode())
                replace_file(self.path / "env.json", pretty(env))

    def keep(self, name: str, source: Path) -> None:
        """Copy a file that a run needs into its directory. Raises :class:`RunDirError` where the disk
        refuses; a copy that is there already asks nothing of it.
        """
        copy = self.path / name
        if self.rank == 0:
            with self._needed():
                data = source.read_bytes()
                if not (is_real_file(copy) and copy.read_bytes() == data):
                    replace_file(copy, data)

    def write_status(
        self, state: RunState, *, step: int, reason: str = "", exit_code: int | None = None
    ) -> None:
        """Replace ``status.json``. ``reason`` says why the run ended; ``exit_code`` is its exit status then.
        Never raises: a disk that refuses it is told of.
        """
        if self.rank == 0:
            write_status(self.path, state, step=step, reason=reason, exit_code=exit_code)

    def write_failure(self, failure: Failure, *, step: int) -> None:
        """Write why this rank failed to its log and, unless another one's failure explains it, to
        ``status.json``, whichever rank it is. Never raises: a disk that refuses it is told of.
        """
        self.log(failure.traceback or f"error: {failure.message}")
        write_failure(self.path, failure, step=step)

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; ``record`` needs an integer ``step``. NaN and infinity are
        kept.
        """
        assert isinstance(record["step"], int)
        if self.rank == 0:
            self._append(_STREAMS[0], _line(record))

    def log_casts(self, step: int, site: str, values: Mapping[str, Any]) -> None:
        """Append one cast site's statistics to ``casts.jsonl``."""
        if self.rank == 0:
            self._append(_STREAMS[2], _line({"step": step, "site": site, **values}))

    def log_event(self, kind: str, *, step: int, **fields: Any) -> None:
        """Append one line to ``events.jsonl``: what happened (``kind``), when, after which step, with any
        JSON fields.
        """
        if self.rank == 0:
            self._append(_STREAMS[1], _line({"time": time.time(), "step": step, "kind": kind, **fields}))

    def log(self, text: str) -> None:
        """Append lines to this rank's log, each with the time (UTC); the only method that every rank may
        write with.
        """
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = "".join(f"{stamp} {line}\n" for line in text.splitlines())
        self._append(f"logs/{self.rank_log.name}", lines.encode(errors="backslashreplace"))

    def truncate_after(self, step: int | None) -> None:
        """Cut records after ``step`` (all of them for None: no checkpoint was found) from metrics and events,
        atomically.

        A last line that a kill left unfinished goes too, and lines that no one can read, with a warning.
        Raises :class:`RunDirError` where the disk refuses.
        """
        if self.rank != 0:
            return
        with self._needed():
            for path in (self.path / name for name in _STREAMS):
                if is_real_file(path):
                    replace_file(path, _kept(path, step))

    def clear_stop(self) -> None:
        """Remove ``STOP`` once it is honoured. Where the disk refuses, that is told: a run that continues
        forgets it in any case.
        """
        if self.rank == 0:
            try:
                remove(self.stop_file)
            except OSError as error:
                _logger.warning("%s could not be removed: %s", self.stop_file, explain_os_error(error))

    def taken_away(self) -> str | None:
        """What has become of a directory that is no longer this run's; None while it is, and on other ranks
        than 0.
        """
        return None if self.lock_fd is None else taken_away(self.path, self.lock_fd)

    def close(self) -> None:
        """Release the directory for other jobs."""
        if self.lock_fd is not None:
            os.close(self.lock_fd)

    def _append(self, name: str, data: bytes) -> None:
        """Append whole lines. A disk that refuses them loses them: the first is told, and how many at the
        next that is written."""
        try:
            append_file(self.path / name, data)
        except OSError as error:
            self._lost[name] = self._lost.get(name, 0) + 1
            if self._lost[name] == 1:  # the warning itself is appended to a log
                problem = explain_os_error(error)
                _logger.warning("LOST a line of %s, training goes on: %s", self.path / name, problem)
        else:
            lost = self._lost.pop(name, 0)
            if lost:
                _logger.warning("%s can be written again; lines lost: %d", self.path / name, lost)

    @contextmanager
    def _needed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirError(
                f"run directory {self.path} cannot be written ({explain_os_error(error)}); make room "
                "there or set run.dir to another folder"
            ) from error


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _kept(path: Path, step: int | None) -> bytes:
    """The lines up to ``step``; what no one can read is left out, and counted unless a kill left it so."""
    kept, unreadable = [], 0
    for line, record in records(path):
        at = None if record is None else record.get("step")
        if not isinstance(at, int):
            unreadable += line.endswith(b"\n") or not line
        elif step is not None and at <= step:
            kept.append(line)
    if unreadable:
        _logger.warning("%s: %d unreadable line(s) left out", path, unreadable)
    return b"".join(kept)
