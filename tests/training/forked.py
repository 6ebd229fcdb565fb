"""Ranks forked from a server that has imported torch: a life lasts about as long as its steps do."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.free_ports import free_ports


def _rank(environment: dict[str, str], log: str, words: list[str]) -> None:
    """Life of a rank."""
    os.environ.update(environment)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    from fp8train.cli import run_command

    status = run_command(words)
    sys.stdout.flush()
    os._exit(status)


class Runs:
    """Starts ranks of one configuration, in run directories beside it.

    Attributes:
        config: the file.
        logs: folder of what ranks print, ``NAME.RANK.log``.
    """

    def __init__(self, config: Path) -> None:
        self.config = config
        self.logs = config.parent
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fp8train.training.run", "fp8train.cli"])

    def start(self, name: str, overrides: Sequence[str], *, ranks: int) -> list[BaseProcess]:
        """``train`` with these overrides in the run directory ``name``."""
        (port,) = free_ports(1)
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["train", str(self.config), f"run.dir={self.config.parent}", f"run.name={name}", *overrides]
        started = []
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = str(self.logs / f"{name}.{rank}.log")
            started.append(self.context.Process(target=_rank, args=(environment, log, words), daemon=True))
            started[-1].start()
        return started

    def log(self, name: str) -> str:
        """What rank 0 of a run has printed so far."""
        return (self.logs / f"{name}.0.log").read_text()


def join(ranks: list[BaseProcess], seconds: float = 120.0) -> list[int | None]:
    """Exit codes; a rank that hangs is None, and killed."""
    deadline = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def wait_for_the_loop(ranks: list[BaseProcess], directory: Path) -> None:
    """Until then there is nothing to hurt. A run that is resumed says so in its status too."""
    status = directory / "status.json"
    began = time.time()
    while all(rank.is_alive() for rank in ranks) and time.time() - began < 120:
        if status.exists() and status.stat().st_mtime > began and '"time"' in status.read_text():
            return
        time.sleep(0.002)
