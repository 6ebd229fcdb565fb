"""Why a job failed, told in its run directory by whichever ranks fail.

Every rank leaves its failure in a file of its own under ``logs/failures/``, on a file system that all nodes
see, before it writes ``status.json``. So no rank can hide another's, and the last to write has seen them all:
one that only lost its peers gives way, whoever wrote first and on whichever node.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8train.checkpoint.errors import explain_os_error
from fp8train.comm.failures import INTERRUPTED, Failure, cause, leave, recorded, recorded_here
from fp8train.files import overwrite_file, replace_file
from fp8train.run_dir.claim import FAILURES, STATUS_FILE, in_use, load_status, recorded_step

if TYPE_CHECKING:
    from fp8train.comm.rendezvous import Peer

RunState = Literal["running", "completed", "stopped", "preempted", "failed", "interrupted"]

_BLOCK = 4096
_logger = logging.getLogger(__name__)


def write_status(
    path: Path, state: RunState, *, step: int, reason: str = "", exit_code: int | None = None, **more: Any
) -> bool:
    """Replace the ``status.json`` of the run directory ``path``; ``more`` are further fields.

    A full disk leaves no room for a new file, but the old one keeps its block: then it is overwritten in
    place, without ``more``. Whether the status is there; where it is not, that is told as a warning.
    """
    record = {"state": state, "step": step, "reason": reason, "exit_code": exit_code, "time": time.time()}
    file = path / STATUS_FILE
    try:
        replace_file(file, pretty(record | more))
        return True
    except OSError as error:
        problem = explain_os_error(error)
    with suppress(OSError):
        short = pretty({**record, "reason": reason[: _BLOCK // 8]} | more)
        overwrite_file(file, short if len(short) < _BLOCK else pretty(record | {"reason": reason[:200]}))
        return True
    _logger.warning("%s could not be written (%s) and does not say that the run is %s", file, problem, state)
    return False


def write_failure(path: Path, failure: Failure, *, step: int) -> Failure:
    """Make ``status.json`` say why a job failed, which is not always what this rank has to say: the cause,
    as far as it is known. Never raises."""
    with suppress(OSError):
        leave(path / FAILURES, failure)
    told = _told(path)
    while True:  # again where another rank has left its own meanwhile
        first = cause([*_known(path), failure])
        assert first is not None
        if told is not None and (told.rank, told.message) == (first.rank, first.message):
            return first
        write_status(
            path,
            "interrupted" if first.exit_status == INTERRUPTED else "failed",
            step=step,
            reason=first.message.splitlines()[0],
            exit_code=first.exit_status,
            message=first.message,
            rank=first.rank,
            peers_lost=first.peers_lost,
        )
        told = first


def amend_failure(path: Path, failure: Failure, *, patience_s: float = 5.0) -> None:
    """Write, for ranks that were killed, why the job in the run directory ``path`` failed; not if another job
    has taken it by now. Ranks on other nodes may take ``patience_s`` to let go of it. Never raises.
    """
    deadline = time.monotonic() + patience_s
    while in_use(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    status = read_status(path)
    if status is not None and status["state"] in ("running", "failed") and not in_use(path):
        write_failure(path, failure, step=recorded_step(path))


def read_failure(path: Path, *, patience_s: float = 0.0) -> Failure | None:
    """The failure behind the others, as far as ranks have told; waits for one that is more than lost peers.
    Failures of this node count even where the run directory is gone."""
    deadline = time.monotonic() + patience_s
    while True:
        first = cause(_known(path))
        if (first is not None and not first.peers_lost) or time.monotonic() >= deadline:
            return first
        time.sleep(0.05)


def report_gone(path: Path, peers: Iterable[Peer], *, step: int) -> Failure | None:
    """For ranks of this machine that have ended and left no word, put that on record: the first of them. Who
    started them will know more."""
    spoken = {failure.rank for failure in _known(path)}
    for peer in peers:
        if peer.rank not in spoken and peer.is_gone:
            message = f"rank {peer.rank} ended without a word (process {peer.pid}): it was killed, or crashed"
            gone = Failure(peer.rank, message, time=time.time(), guessed=True)
            write_failure(path, gone, step=step)
            return gone
    return None


def _known(path: Path) -> list[Failure]:
    return [*recorded(path / FAILURES), *recorded_here()]


def _told(path: Path) -> Failure | None:
    """The failure that ``status.json`` tells of."""
    record = read_status(path)
    if record is None or not isinstance(record.get("rank"), int) or "message" not in record:
        return None
    return Failure(record["rank"], str(record["message"]), record["exit_code"])


def read_status(path: Path) -> dict[str, Any] | None:
    """The ``status.json`` of the run directory ``path``, if it can be read and is one."""
    try:
        record = load_status(path)
    except (OSError, ValueError):
        return None
    return record if "exit_code" in record else None


def pretty(record: Mapping[str, Any]) -> bytes:
    """A record as the text of a file of its own."""
    return (json.dumps(dict(record), indent=2) + "\n").encode()
