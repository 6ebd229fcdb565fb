"""What a run directory tells about the end of a run: whoever writes, in whichever order, on whatever disk."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8train.comm.failures import Failure, leave
from fp8train.comm.rendezvous import Peer
from fp8train.run_dir import directory, failed
from fp8train.run_dir.claim import FAILURES, RunDirError
from fp8train.run_dir.directory import RunDir
from fp8train.run_dir.failed import amend_failure, read_failure, report_gone, write_failure, write_status

OWN = Failure(2, "the loss is\na fish", 3, time=20.0)
LATER = Failure(1, "what came of it", 2, time=30.0)
LOST = Failure(0, "Connection closed by peer", 1, peers_lost=True, time=10.0)
GUESS = Failure(2, "rank 2 ended without a word", 1, time=5.0, guessed=True)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.open(tmp_path, "exp", resume="auto", overwrite=False, group=None)


def status(path: Path) -> dict[str, Any]:
    return json.loads((path / "status.json").read_text())


@pytest.mark.parametrize("order", list(itertools.permutations((OWN, LATER, LOST, replace(GUESS, rank=3)))))
def test_the_cause_is_told_in_whichever_order_ranks_write(run: RunDir, order: tuple[Failure, ...]) -> None:
    for failure in order:
        write_failure(run.path, failure, step=7)
    told = status(run.path)
    assert (told["state"], told["rank"], told["exit_code"]) == ("failed", 2, 3)
    assert (told["reason"], told["message"]) == ("the loss is", "the loss is\na fish")
    assert not told["peers_lost"]
    assert read_failure(run.path) == OWN


def test_who_started_a_rank_knows_more_than_its_peers(run: RunDir) -> None:
    write_failure(run.path, LOST, step=1)
    write_failure(run.path, GUESS, step=1)
    assert status(run.path)["reason"] == "rank 2 ended without a word"
    run.close()
    amend_failure(run.path, Failure(2, "rank 2 was killed by SIGKILL", 1, time=99.0))
    assert (status(run.path)["rank"], status(run.path)["reason"]) == (2, "rank 2 was killed by SIGKILL")


def test_a_rank_of_another_machine_is_waited_for(run: RunDir) -> None:
    """It writes into the shared directory while this one, which lost its peers, already looks there."""
    write_failure(run.path, LOST, step=1)
    late = threading.Timer(0.2, lambda: leave(run.path / FAILURES, OWN))
    late.start()
    assert read_failure(run.path, patience_s=30.0) == OWN
    late.join()


def test_a_peer_that_is_gone_is_named(run: RunDir) -> None:
    here = os.uname().nodename
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # ended, and not collected: as torchrun's children are
    peers = [Peer(0, here, os.getpid()), Peer(1, "elsewhere", 1), Peer(2, here, pid)]
    gone = report_gone(run.path, peers, step=3)
    os.waitpid(pid, 0)
    assert gone is not None
    assert gone.rank == status(run.path)["rank"] == 2
    assert report_gone(run.path, peers, step=3) is None  # it has been told


def test_the_failures_of_an_earlier_job_are_forgotten(run: RunDir) -> None:
    write_failure(run.path, OWN, step=1)
    run.close()
    again = RunDir.open(run.path.parent, "exp", resume="auto", overwrite=False, group=None)
    assert read_failure(again.path) is None
    write_failure(again.path, LATER, step=2)
    assert status(again.path)["rank"] == 1


def test_a_job_that_fails_once_it_has_claimed_the_directory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path, *args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(KeyboardInterrupt):
        RunDir.open(tmp_path, "exp", resume="auto", overwrite=False, group=None)
    told = status(tmp_path / "exp")
    assert (told["state"], told["exit_code"]) == ("interrupted", 130)


# ---- disks that refuse


def refuse(code: int) -> Callable[..., None]:
    def refusing(path: Path, *args: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    return refusing


@pytest.mark.parametrize("reason", ["", "x" * 3000])
def test_a_full_disk_has_room_for_the_status(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """The file keeps its block, and shrinks or grows in it."""
    inode = (run.path / "status.json").stat().st_ino
    monkeypatch.setattr(failed, "replace_file", refuse(errno.ENOSPC))
    for step, text in enumerate(("first", reason, "last")):
        assert write_status(run.path, "stopped", step=step, reason=text, exit_code=0, message=3 * text)
        told = status(run.path)
        assert (told["state"], told["step"], told["exit_code"]) == ("stopped", step, 0)
        assert text.startswith(told["reason"])
        assert (run.path / "status.json").stat().st_size < 4096
    assert (run.path / "status.json").stat().st_ino == inode


def test_a_status_that_cannot_be_written_is_told(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("replace_file", "overwrite_file"):
        monkeypatch.setattr(failed, name, refuse(errno.EROFS))
    run.write_status("completed", step=9, exit_code=0)
    run.write_failure(OWN, step=9)
    assert "the file system is read-only) and does not say that the run is completed" in caplog.text
    assert "does not say that the run is failed" in caplog.text


WRITERS: dict[str, tuple[Callable[[RunDir], object], bool]] = {
    # What writes, and whether the run needs it before its first step.
    "metrics": (lambda run: run.log_metrics({"step": 1}), False),
    "events": (lambda run: run.log_event("x", step=1), False),
    "casts": (lambda run: run.log_casts(1, "site", {}), False),
    "log": (lambda run: run.log("text"), False),
    "status": (lambda run: run.write_status("running", step=1), False),
    "failure": (lambda run: run.write_failure(OWN, step=1), False),
    "stop": (lambda run: run.clear_stop(), False),
    "config": (lambda run: run.write_description("x", {}), True),
    "tokenizer": (lambda run: run.keep("tokenizer.json", Path(__file__)), True),
    "truncation": (lambda run: run.truncate_after(0), True),
}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_on_a_disk_that_refuses(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, writer: str, code: int
) -> None:
    run.log_metrics({"step": 0})
    for name in ("append_file", "replace_file", "remove"):
        monkeypatch.setattr(directory, name, refuse(code))
    for name in ("replace_file", "overwrite_file", "leave"):
        monkeypatch.setattr(failed, name, refuse(code))
    write, needed = WRITERS[writer]
    if needed:
        with pytest.raises(RunDirError, match=r"cannot be written .* make room there or set run.dir"):
            write(run)
        return
    for _ in range(3):
        write(run)
    assert caplog.records
    if writer in ("metrics", "events", "casts", "log"):
        assert caplog.text.count("LOST a line") == 1  # once, not at every line
        monkeypatch.undo()
        write(run)
        assert "can be written again; lines lost: 3" in caplog.text


def test_a_log_that_cannot_be_written_does_not_call_itself(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings go to the log; so does the one that the log cannot be written."""
    monkeypatch.setattr(directory, "append_file", refuse(errno.ENOSPC))
    seen = []

    class ToTheLog(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())
            run.log(record.getMessage())

    handler, logger = ToTheLog(), logging.getLogger("fp8train")
    logger.addHandler(handler)
    try:
        run.log_metrics({"step": 1})
    finally:
        logger.removeHandler(handler)
    assert [text.split(",")[0] for text in seen] == [
        f"LOST a line of {run.path / name}" for name in ("metrics.jsonl", "logs/rank0.log")
    ]


def test_a_copy_that_is_there_is_left_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run.keep("tokenizer.json", Path(__file__))
    monkeypatch.setattr(directory, "replace_file", refuse(errno.ENOSPC))
    run.keep("tokenizer.json", Path(__file__))
    assert (run.path / "tokenizer.json").read_bytes() == Path(__file__).read_bytes()


def test_a_directory_that_was_taken_away_is_not_made_again(
    run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run.taken_away() is None
    (run.path / "run.lock").unlink()  # somebody tidied up
    assert run.taken_away() is None
    shutil.rmtree(run.path)
    assert "was deleted while this run was using it" in (run.taken_away() or "")
    run.write_status("running", step=1)
    run.write_failure(OWN, step=1)
    run.log_metrics({"step": 1})
    run.clear_stop()
    assert not run.path.exists()
    other = RunDir.open(tmp_path, "exp", resume="auto", overwrite=False, group=None)
    assert "was replaced while this run was using it" in (run.taken_away() or "")
    assert other.taken_away() is None
    assert replace(run, rank=1, lock_fd=None).taken_away() is None
