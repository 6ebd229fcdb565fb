"""Which failure is the cause, and which process tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8train.comm.failures import (
    Failure,
    PeerFailedError,
    cause,
    describe,
    lost_peers,
    record,
    recorded,
    speaks,
)
from fp8train.config.errors import ConfigError


class DistNetworkError(RuntimeError):
    """By its name, as torch's."""


@pytest.mark.parametrize(
    "error",
    [
        # As gloo, the store and NCCL of torch 2.11 to 2.13 say it.
        RuntimeError(
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:41"
        ),
        RuntimeError("[pair.cc:144] Read error [127.0.0.1]:3: Connection reset by peer"),
        RuntimeError("[pair.cc:80] writev [::1]:22: Broken pipe"),
        RuntimeError("[unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete"),
        RuntimeError("NCCL error: remote process exited or there was a network error, NCCL version 2.27"),
        RuntimeError("rank 1: RuntimeError: [pair.cc:538] Connection closed by peer [127.0.0.1]:41"),
        DistNetworkError("The client socket has failed"),
    ],
)
def test_lost_connections_are_known(error: RuntimeError) -> None:
    assert lost_peers(error)
    assert describe(error).peers_lost


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ValueError("Connection closed by peer"),
        ConfigError("the connection was closed by peer review"),
        KeyError("x"),
    ],
)
def test_other_errors_are_a_ranks_own(error: Exception) -> None:
    assert not describe(error).peers_lost


def test_the_cause_is_the_first_that_is_no_lost_connection() -> None:
    lost, late, early = (
        Failure(0, "gone", 1, True, 1.0),
        Failure(1, "b", 2, False, 3.0),
        Failure(2, "c", 3, False, 2.0),
    )
    assert cause([lost, late, early]) is early
    assert cause([lost]) is lost
    assert cause([]) is None


def test_a_description_keeps_status_and_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    try:
        raise KeyError("layers.0")
    except KeyError as error:
        bug = describe(error)
    assert (bug.rank, bug.message, bug.exit_status) == (3, "KeyError: 'layers.0'", 1)
    assert bug.traceback.startswith("Traceback")
    assert bug.traceback.endswith("KeyError: 'layers.0'\n")
    assert bug.last_word().startswith("rank 3: Traceback")
    mine = describe(ConfigError("a\nb"))
    assert (mine.message, mine.exit_status, mine.traceback) == ("a\nb", 2, "")
    assert describe(KeyboardInterrupt()).exit_status == 130
    peer = describe(PeerFailedError(Failure(1, "diverged", 3)))
    assert (peer.message, peer.exit_status, peer.peers_lost) == ("rank 1 failed: diverged", 3, True)


@pytest.fixture
def as_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Become a rank that torchrun started."""
    monkeypatch.delenv("FP8TRAIN_FAILURES", raising=False)

    def become(rank: int) -> Path:
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        return file

    return become


def test_under_torchrun_the_rank_that_knows_speaks_once(as_rank) -> None:
    own = Failure(1, "out of memory", 2, time=1.0)
    file = as_rank(1)
    record(own)
    assert speaks(own)
    assert json.loads(file.read_text())["message"]["message"] == "out of memory"
    as_rank(0)
    lost = Failure(0, "Connection closed by peer", 1, peers_lost=True, time=2.0)
    record(lost)
    assert not speaks(lost)
    as_rank(2)
    again = Failure(2, "out of memory", 2, time=3.0)
    record(again)
    assert not speaks(again)
    assert cause(recorded(file.parent.parent)) == own


def test_lost_connections_are_told_where_nobody_knows_more(as_rank) -> None:
    told = []
    for rank in (0, 1):
        as_rank(rank)
        lost = Failure(rank, "Connection closed by peer", 1, peers_lost=True)
        record(lost)
        told.append(speaks(lost))
    assert told == [True, False]


def test_under_our_launcher_ranks_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8TRAIN_FAILURES", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    first = Failure(1, "first", 3, time=1.5)
    record(first)
    record(Failure(1, "what came of it", 1, time=1.6))
    assert not speaks(first)
    assert recorded(tmp_path) == [first]
    (tmp_path / "rank0.json").write_text("{torn")
    assert recorded(tmp_path) == [first]


def test_lost_peers_are_no_traceback() -> None:
    text = describe(RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:41")).last_word()
    assert text.startswith(
        "error: rank 0 lost its peers (RuntimeError: [pair.cc:538] Connection closed by peer"
    )
    assert len(text.splitlines()) == 2
    assert describe(KeyboardInterrupt()).last_word() == "interrupted"


def test_without_a_launcher_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FP8TRAIN_FAILURES", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert speaks(Failure(0, "x"))
    assert not speaks(Failure(1, "x"))
