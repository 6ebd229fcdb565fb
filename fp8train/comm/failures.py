"""Which process failed first, and which of them says so.

When one rank fails, its peers lose their connections and fail too, perhaps sooner and louder. So a rank
records its failure before it leaves its groups, that is before any peer can notice; and a failure that only
says that peers are gone is marked, and gives way to every other.

Records lie in a folder that the ranks of a node share: the launcher's (:mod:`fp8train.launch`), which tells
the cause once all ranks have ended, or the one that torchrun makes for each start, where the first rank with
something to say says it. Without such a folder rank 0 speaks. Ranks of other nodes find them in the run
directory (:mod:`fp8train.run_dir.failed`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fp8train.config.errors import UserError
from fp8train.json_text import read_object

FOLDER_VARIABLE = "FP8TRAIN_FAILURES"
"""Environment variable with the launcher's folder; its presence silences ranks."""
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells report it."""

_TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"
# Of gloo, NCCL and the store. Time-outs are among them: somebody else did not come.
_LOST = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|aborted)|closed by peer|broken pipe|socket closed"
    r"|remote process exited|failed to recv, got 0 bytes|store .*timed? ?out"
    r"|timed out (waiting|after) .*(send|recv|operation|clients)|wait timeout after|application timeout",
    re.IGNORECASE,
)
_LOST_TYPES = ("DistNetworkError", "DistStoreError")


class PeerFailedError(UserError):
    """Another rank failed, and this one knows why."""

    def __init__(self, failure: Failure) -> None:
        rank = f"rank {failure.rank} "
        super().__init__(f"{rank}failed: {failure.message.removeprefix(rank)}")
        self.exit_status = failure.exit_status


@dataclass(frozen=True)
class Failure:
    """Why a rank ended.

    Attributes:
        rank: which.
        message: what a person reads; of a bug ``Type: text``.
        exit_status: of the process.
        peers_lost: whether it only says that other ranks are gone.
        time: seconds since 1970.
        traceback: of a bug; empty for what the user can mend.
        guessed: a peer tells it, from what it found; gives way to whoever knows.
    """

    rank: int
    message: str
    exit_status: int = 1
    peers_lost: bool = False
    time: float = 0.0
    traceback: str = ""
    guessed: bool = False

    @property
    def _evidence(self) -> tuple[bool, bool, float]:
        return self.peers_lost, self.guessed, self.time

    def explains_more_than(self, other: Failure) -> bool:
        """Whether this is rather the cause than ``other``: lost peers never are, and of two the earlier."""
        return self._evidence < other._evidence

    def last_word(self) -> str:
        """What a terminal shows of it."""
        if self.exit_status == INTERRUPTED:
            return "interrupted"
        if self.traceback and self.peers_lost:
            return (
                f"error: rank {self.rank} lost its peers ({self.message.splitlines()[0]:.160})\n"
                "the one that ended first says why, on its machine and in logs/ of the run directory"
            )
        if self.traceback:
            return f"rank {self.rank}: {self.traceback.rstrip()}"
        return f"error: {self.message}"


def own_rank() -> int:
    """This process's rank as its launcher says it, whatever else is wrong with the environment."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def describe(error: BaseException) -> Failure:
    """The failure of this process that ended with ``error``."""
    rank, now = own_rank(), time.time()
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, "interrupted", INTERRUPTED, time=now)
    if isinstance(error, UserError):
        lost = isinstance(error, PeerFailedError)
        return Failure(rank, str(error), error.exit_status, peers_lost=lost, time=now)
    text = "".join(traceback.format_exception(error))
    return Failure(rank, f"{type(error).__name__}: {error}", 1, lost_peers(error), now, text)


def lost_peers(error: BaseException) -> bool:
    """Whether an error of a collective only says that another process is gone."""
    if any(kind.__name__ in _LOST_TYPES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure behind the others: the first one that is more than lost peers."""
    found: Failure | None = None
    for one in failures:
        if found is None or one.explains_more_than(found):
            found = one
    return found


def record(failure: Failure) -> None:
    """Leave a failure of this process where launchers look, unless an earlier one is there. Never raises."""
    folder = _folder()
    with suppress(OSError):
        if folder is not None and not leave(folder, failure):
            return
        if _TORCHRUN_FILE in os.environ:  # torchrun's own summary shows the text that it finds there
            text = failure.traceback or failure.message
            details = {"py_callstack": text, "timestamp": str(int(failure.time))}
            content = {"message": {"message": failure.message, "extraInfo": details}}
            Path(os.environ[_TORCHRUN_FILE]).write_text(json.dumps(content))


def leave(folder: Path, failure: Failure) -> bool:
    """Leave a failure in a folder, unless there is one of that rank that explains as much; whether it was
    left. May raise OSError."""
    path = folder / f"rank{failure.rank}.json"
    if any(one.rank == failure.rank and not failure.explains_more_than(one) for one in recorded(folder)):
        return False
    tmp = path.with_suffix(f".{os.getpid()}.tmp")  # in a hang, several ranks tell of one
    tmp.write_text(json.dumps(asdict(failure)))
    tmp.rename(path)
    return True


def recorded_here() -> list[Failure]:
    """The failures that ranks of this node have left with their launcher."""
    folder = _folder()
    return [] if folder is None else recorded(folder)


def recorded(folder: Path) -> list[Failure]:
    """The failures in a folder."""
    found = []
    for path in sorted(folder.glob("rank*.json")):
        with suppress(OSError, ValueError):
            found.append(failure_from(read_object(path)))
    return found


def failure_from(record: Mapping[str, Any]) -> Failure:
    """The failure that a record describes, field by field.

    Raises:
        ValueError: it describes none.
    """
    kinds: dict[str, type | tuple[type, ...]]
    kinds = {"rank": int, "message": str, "exit_status": int, "peers_lost": bool, "time": (int, float)}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("not the record of a failure")
    if not record["message"].strip() or not isinstance(record.get("traceback", ""), str):
        raise ValueError("a failure without a message")
    return Failure(**{field.name: record[field.name] for field in fields(Failure) if field.name in record})


def speaks(failure: Failure, *, otherwise: bool | None = None) -> bool:
    """Whether this process is the one that prints its failure. Call it once, after :func:`record`.
    ``otherwise``: the answer where ranks share no folder, in place of "rank 0 does"."""
    folder = _folder()
    if folder is None:
        return failure.rank == 0 if otherwise is None else otherwise
    if FOLDER_VARIABLE in os.environ:
        return False
    if failure.peers_lost and not all(one.peers_lost for one in recorded(folder)):
        return False
    try:
        (folder / ("told_lost" if failure.peers_lost else "told")).touch(exist_ok=False)
    except OSError:
        return False
    return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let this process, which is about to fail, finish writing why: a launcher that has seen another rank end
    sends SIGTERM to the rest. Main thread only."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _folder() -> Path | None:
    """What the ranks of this node share: ours, or torchrun's ``attempt_0/LOCAL_RANK/error.json``."""
    if FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    file = os.environ.get(_TORCHRUN_FILE)
    if file is None or not Path(file).parent.parent.name.startswith("attempt_"):
        return None
    return Path(file).parent.parent
