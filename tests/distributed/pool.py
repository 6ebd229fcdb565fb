"""Worker processes that stay: a distributed test costs milliseconds instead of an import of torch per rank.

    def summed(group, rank, world_size, start):  # at the top of a test module: workers import it by name
        x = torch.tensor(float(start + rank))
        dist.all_reduce(x)
        return x.item()

    def test_sum(gloo_pool):
        assert gloo_pool.run(summed, 4, 10) == [46.0] * 4

Each run gets a fresh default process group (or only the environment that torchrun would set, with
``join=False``), a fixed seed and one thread per rank. Arguments and results travel as copies, by
``torch.save`` (plain pickle fails for float8 tensors). If a rank raises, the exception is raised in the test
with the rank's traceback as a note; if it dies or hangs, the test fails with :class:`WorkerFailure` and the
worker is replaced.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MAX_WORKERS = 8
GROUP_TIMEOUT_S = 120.0
_GRACE_S = 10.0
"""After one rank failed, how long its peers may take to notice."""


_OK, _FAILED = b"+", b"-"
_RAISED_AT = "_raised_at"


class _Reply(NamedTuple):
    ok: bool
    value: Any
    """Result or exception."""
    traceback: str = ""
    time: float = 0.0
    """Of the exception; the monotonic clock is the same in all processes."""


class WorkerFailure(RuntimeError):
    """Ranks died or did not answer in time."""


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    stacks: Path
    """Where the worker writes the stacks of its threads when it is given up."""

    def stop(self) -> str:
        """Kill the worker; returns the stack it hung in, if any."""
        if self.process.is_alive():
            self.process.terminate()  # SIGTERM: faulthandler writes the stack
            self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
        return self.stacks.read_text() if self.stacks.exists() else ""


class GlooPool:
    """Up to eight workers, started when first needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._scratch = tempfile.TemporaryDirectory(prefix="gloo-pool-")
        self._workers: list[_Worker] = []
        self._started = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        join: bool = True,
    ) -> list[Any]:
        """``[function(group, rank, world_size, *args) for every rank]``, each in its process.

        Args:
            function: importable by name.
            world_size: ranks, at most eight.
            args: the same for every rank; pickled.
            timeout: seconds until silent ranks are given up.
            join: initialise the default group (gloo) and pass it; else ``group`` is None and the function
                finds the
                environment variables of torchrun and may join by itself.

        Raises:
            WorkerFailure: ranks died or hung.
            Exception: the first exception of a rank, with its traceback as a note.
        """
        assert 1 <= world_size <= MAX_WORKERS
        self._ensure(world_size)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(world_size):
            task = (function, rank, world_size, store.port, join, args)
            self._workers[rank].connection.send_bytes(_pack(task))
        replies = self._collect(world_size, timeout)
        missing = [rank for rank in range(world_size) if rank not in replies]
        # The first to raise first: its peers fail after it, but may say so before it does.
        failed = sorted(
            (rank for rank in replies if not replies[rank].ok), key=lambda rank: replies[rank].time
        )
        if missing:
            raise self._give_up(missing, replies, failed, timeout)
        if failed:
            first = replies[failed[0]]
            others = f"\n(ranks {failed[1:]} failed after it)" if failed[1:] else ""
            first.value.add_note(f"on rank {failed[0]} of {world_size}:\n{first.traceback}{others}")
            raise first.value
        return [replies[rank].value for rank in range(world_size)]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()  # they leave at the end of file
        for worker in self._workers:
            worker.process.join(5.0)
            worker.stop()
        self._workers.clear()
        self._scratch.cleanup()

    def _ensure(self, count: int) -> None:
        for i, worker in enumerate(self._workers):
            if not worker.process.is_alive():
                worker.stop()
                self._workers[i] = self._start()
        while len(self._workers) < count:
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        stacks = Path(self._scratch.name) / f"stacks-{self._started}.txt"
        self._started += 1
        process = self._context.Process(target=_work, args=(theirs, str(stacks)), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, stacks)

    def _collect(self, world_size: int, timeout: float) -> dict[int, _Reply]:
        """Replies by rank, in order of arrival, until all came or time is up."""
        packed: dict[int, bytes] = {}
        waiting = {self._workers[rank].connection: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    packed[rank] = self._workers[rank].connection.recv_bytes()
                except (EOFError, ConnectionResetError):
                    self._workers[rank].process.join(5.0)  # died: no reply, but an exit code
                if packed.get(rank, _FAILED).startswith(_FAILED):
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        # Decoded only now: every pipe is empty, whatever decoding raises.
        return {rank: _Reply(data.startswith(_OK), *_unpack(data[1:])) for rank, data in packed.items()}

    def _give_up(
        self, missing: list[int], replies: dict[int, _Reply], failed: list[int], timeout: float
    ) -> WorkerFailure:
        """Kill and forget the ranks that did not answer; the failure to raise."""
        lines = []
        for rank in missing:
            worker = self._workers[rank]
            code = worker.process.exitcode
            what = f"hung (limit {timeout:g} s)" if code is None else f"died with exit code {code}"
            lines.append(f"rank {rank} {what}\n{worker.stop()}".rstrip())
        lines += [f"rank {rank} raised\n{replies[rank].traceback}" for rank in failed]
        self._workers = [worker for i, worker in enumerate(self._workers) if i not in missing]
        return WorkerFailure("\n".join(lines))


def _work(connection: Connection, stacks: str) -> None:
    """Life of a worker: one task after the other until the parent closes the pipe."""
    file = open(stacks, "w")  # noqa: SIM115 - open for the life of the process
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        # chain: after writing the stacks, SIGTERM kills as usual.
        faulthandler.register(15, file=file, all_threads=True, chain=True)
        connection.send_bytes(_perform(task))


def _perform(task: bytes) -> bytes:
    """The reply to a task."""
    directory, environment = os.getcwd(), dict(os.environ)
    try:
        function, rank, world_size, port, join, args = _unpack(task)
        _fresh_state(rank, world_size, port)
        return _OK + _pack((_call(function, rank, world_size, join, args),))
    except BaseException as error:  # everything, SystemExit too, belongs to the test
        return _FAILED + _pack_error(error)
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)


def _fresh_state(rank: int, world_size: int, port: int) -> None:
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # Else a rank with nothing to do may leave, closing its sockets, while a peer still connects to it.
        TORCH_DIST_INIT_BARRIER="1",
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store lives in the parent: no port can be taken meanwhile
    )


def _call(function: Callable[..., Any], rank: int, world_size: int, join: bool, args: tuple[Any, ...]) -> Any:
    try:
        group = None
        if join:
            dist.init_process_group(
                "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=GROUP_TIMEOUT_S)
            )
            group = dist.group.WORLD
        return function(group, rank, world_size, *args)
    except BaseException as error:
        error.__dict__[_RAISED_AT] = time.monotonic()  # before leaving the group, which makes the peers fail
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _pack_error(error: BaseException) -> bytes:
    text = traceback.format_exc()
    raised_at = error.__dict__.pop(_RAISED_AT, time.monotonic())
    try:
        packed = _pack((error, text, raised_at))
        _unpack(packed)
    except Exception:  # an exception that cannot be pickled may fail in any way
        packed = _pack((RuntimeError(f"{type(error).__name__}: {error}"), text, raised_at))
    return packed


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
