"""Ranks that meet, and what those say that wait in vain. Ranks are threads here; each has its own store."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fp8train.comm import rendezvous
from fp8train.comm.rendezvous import Peer, StoppedBeforeMeetingError, meet
from fp8train.config.environment import World
from fp8train.config.errors import ConfigError
from tests.free_ports import free_ports


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    (port,) = free_ports(1)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def start(*worlds: tuple[int, int], timeout_s: float = 60.0, **more: Any) -> list[Any]:
    """Ranks (rank, size) at once; what came of each: its peers or its error."""

    def one(world: tuple[int, int]) -> tuple[Any, Any]:
        try:
            store, peers = meet(World(world[1], world[0]), timeout_s=timeout_s, **more)
            return peers, store
        except (ConfigError, StoppedBeforeMeetingError) as error:
            return error, None

    with ThreadPoolExecutor(len(worlds)) as pool:
        ended = list(pool.map(one, worlds))  # stores live until all have ended
    return [outcome for outcome, _ in ended]


def test_all_come(port: int) -> None:
    peers = [Peer(rank, socket.gethostname(), os.getpid()) for rank in range(3)]
    assert start((2, 3), (0, 3), (1, 3)) == [peers] * 3
    assert not peers[0].is_gone


def test_who_waits_in_vain_says_who_is_missing(port: int) -> None:
    for error in start((0, 4), (2, 4), timeout_s=1.0):
        assert (
            f"could not meet the others at 127.0.0.1:{port} within 1 s (2 came; missing: rank 1, 3)"
            in str(error)
        )
        assert error.exit_status == 2
        assert len(str(error).splitlines()) == 2


@pytest.mark.parametrize(
    ("address", "problem"), [("127.0.0.1", "connection refused"), ("no.such.host.invalid", "")]
)
def test_nobody_is_at_the_address(
    port: int, monkeypatch: pytest.MonkeyPatch, address: str, problem: str
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    (error,) = start((1, 2), timeout_s=0.3)
    assert f"rank 1 of 2 could not meet the others at {address}:{port} within 0.3 s ({problem}" in str(error)


def test_the_port_is_in_use(port: int) -> None:
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        (error,) = start((0, 2))
    assert str(error).startswith(f"rank 0 cannot listen at 127.0.0.1:{port}: the port is in use")
    assert "MASTER_PORT" in str(error).splitlines()[1]


def test_two_processes_of_one_rank(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", threading.get_native_id)  # threads are the processes here
    errors = [str(error) for error in start((0, 3), (1, 3), (1, 3), timeout_s=2.0)]
    assert "(2 came; missing: rank 2)" in errors[0]
    assert sum("two processes say that they are rank 1: process " in error for error in errors) == 1


def test_ranks_that_disagree_how_many_they_are(port: int) -> None:
    first, second = start((0, 2), (1, 3), timeout_s=1.0)
    assert "rank 0 was started as one of 2, rank 1 as one of 3" in str(first)
    assert isinstance(second, ConfigError)


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_a_stop_meanwhile(port: int, monkeypatch: pytest.MonkeyPatch, grace_s: float) -> None:
    """Whoever is there stops together; within the grace, the others are waited for."""
    monkeypatch.setattr(rendezvous, "_GRACE_S", grace_s)
    stopping: Callable[[], bool] = lambda: True  # noqa: E731
    if grace_s:
        assert all(isinstance(one, list) for one in start((0, 2), (1, 2), stopping=stopping))
    else:
        assert isinstance(start((0, 3), stopping=stopping)[0], StoppedBeforeMeetingError)
        assert isinstance(start((1, 3), stopping=stopping)[0], StoppedBeforeMeetingError)
