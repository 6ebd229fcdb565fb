"""How the processes of a job find each other, and what is said when they do not.

Every rank connects to the store at ``MASTER_ADDR:MASTER_PORT``, writes who it is and waits until all have. So
one that waits in vain can say how many came and which are missing, two that claim the same rank are told
apart, and a rank that later loses its peers can look which of their processes are gone. The price is a key
for each rank and questions every 50 ms until all are there.

A stop that is asked for meanwhile shortens the wait: who is still missing 15 s later is not waited for. Who
decides first writes down what becomes of the job, ``go`` or ``stop``, and all others that came read it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from fp8train.config.environment import World
from fp8train.config.errors import ConfigError

STARTUP_TIMEOUT_S = 600.0
"""How long ranks wait for each other where nobody says otherwise."""

_POLL_S = 0.05
_KNOCK_S = 5.0
_GRACE_S = 15.0
_CAME, _DECISION = "fp8train/came", "fp8train/decision"
_SHOWN = 8


class StoppedBeforeMeetingError(Exception):
    """A stop was asked for before all ranks were there."""


@dataclass(frozen=True)
class Peer:
    """A process of the job: its rank, machine and process id."""

    rank: int
    host: str
    pid: int

    @property
    def is_gone(self) -> bool:
        """Whether it was on this machine and has ended."""
        if self.host != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        return state in "ZX"  # ended, and its parent has not looked yet


def meet(
    world: World, *, timeout_s: float = STARTUP_TIMEOUT_S, stopping: Callable[[], bool] = lambda: False
) -> tuple[dist.Store, list[Peer]]:
    """Wait until all ranks are there.

    Args:
        world: this process among them; ``MASTER_ADDR`` and ``MASTER_PORT`` are read from the environment.
        timeout_s: how long to wait.
        stopping: whether somebody asked this rank to stop meanwhile.

    Returns:
        The store for the process groups, and all ranks in order.

    Raises:
        ConfigError: not all came in time, the port is in use, two processes are the same rank, or they
            disagree about how many there are.
        StoppedBeforeMeetingError: on all ranks that came.
    """
    deadline = time.monotonic() + timeout_s
    stopping = _for_a_while(stopping)
    hosts_store = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not hosts_store:
        _knock(world, deadline, timeout_s, stopping)
    store = _connect(world, timeout_s, hosts_store=hosts_store)
    mine = f"{world.size} {os.getpid()} {socket.gethostname()}"
    try:
        there = store.compare_set(_key(world.rank), "", mine).decode()
        if there != mine:
            raise ConfigError(
                f"two processes say that they are rank {world.rank}: {_who(there)} and {_who(mine)}\n"
                "does another job use the same MASTER_PORT, or two machines the same node rank?"
            )
        store.add(_CAME, 1)
        _wait(store, world, deadline, timeout_s, stopping)
        said = [text.decode() for text in store.multi_get([_key(rank) for rank in range(world.size)])]
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _not_met(world, timeout_s, _first_line(error)) from error
    for rank, text in enumerate(said):
        if text.split(" ", 1)[0] != str(world.size):
            raise ConfigError(
                f"rank {world.rank} was started as one of {world.size}, rank {rank} as one of "
                f"{text.split(' ', 1)[0]}; start the same number of processes and machines everywhere"
            )
    return store, [_peer(rank, text) for rank, text in enumerate(said)]


def _for_a_while(stopping: Callable[[], bool]) -> Callable[[], bool]:
    """Whether that was so for the time that others get to come."""
    since: float | None = None

    def stopped() -> bool:
        nonlocal since
        if since is None and stopping():
            since = time.monotonic()
        return since is not None and time.monotonic() - since >= _GRACE_S

    return stopped


def _knock(world: World, deadline: float, timeout_s: float, stopping: Callable[[], bool]) -> None:
    """Until somebody listens. The store's own client can only be told how long to try, not to give up, and
    answers a refusal with pages of text."""
    where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection(where, timeout=min(_KNOCK_S, max(left, _POLL_S))).close()
            return
        except OSError as error:
            if left <= 0:
                raise _not_met(world, timeout_s, f"{error.strerror or error}".lower()) from None
        if stopping():
            raise StoppedBeforeMeetingError
        time.sleep(4 * _POLL_S)


def _connect(world: World, timeout_s: float, *, hosts_store: bool) -> dist.Store:
    try:
        store: dist.Store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=hosts_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _not_met(world, timeout_s, _first_line(error)) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"fp8train/attempt_{attempt}", store)


def _wait(
    store: dist.Store, world: World, deadline: float, timeout_s: float, stopping: Callable[[], bool]
) -> None:
    """Until all ranks are there, or one has decided that the job does not begin."""
    while True:
        came = store.add(_CAME, 0)
        decision = store.get(_DECISION).decode() if store.check([_DECISION]) else ""
        if not decision and came >= world.size:
            decision = store.compare_set(_DECISION, "", "go").decode()
        elif not decision and stopping():
            decision = store.compare_set(_DECISION, "", "stop").decode()
        if decision == "go":
            return
        if decision == "stop":
            raise StoppedBeforeMeetingError
        if time.monotonic() >= deadline:
            missing = [rank for rank in range(world.size) if not store.check([_key(rank)])]
            raise _not_met(world, timeout_s, f"{came} came; missing: rank {_shown(missing)}")
        time.sleep(_POLL_S)


def _key(rank: int) -> str:
    return f"fp8train/rank{rank}"


def _not_met(world: World, timeout_s: float, why: str) -> ConfigError:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in why or "address already in use" in why.lower():
        return ConfigError(
            f"rank {world.rank} cannot listen at {where}: the port is in use\n"
            "set MASTER_PORT to a free one, or end the job that has it"
        )
    return ConfigError(
        f"rank {world.rank} of {world.size} could not meet the others at {where} within {timeout_s:g} s "
        f"({why})\n"
        "has every machine started, and is MASTER_ADDR the first one's address as the others see it?"
    )


def _first_line(error: Exception) -> str:
    return f"{str(error).splitlines()[0]:.160}"


def _shown(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return ", ".join(map(str, ranks[:_SHOWN])) + more


def _peer(rank: int, text: str) -> Peer:
    _, pid, host = text.split(" ", 2)
    return Peer(rank, host, int(pid))


def _who(text: str) -> str:
    peer = _peer(0, text)
    return f"process {peer.pid} on {peer.host}"
