"""Saving while training goes on: a snapshot at the step boundary, then a thread that writes.

The thread has a gloo group of its own, so its collectives never meet training's, and runs what a synchronous
save runs (:func:`~fp8train.checkpoint.save.write_checkpoint`): the pointer moves when all ranks are done. A
thread and not a process: the snapshot need not be shared or copied again, and hashing, writing and syncing
hold no interpreter lock. What the thread must not touch is global: signal handlers, the warnings filter, the
default group, the current CUDA device.

Ranks finish at different moments, so nobody acts on what its own thread says. :meth:`BackgroundSaver.poll`
and :meth:`BackgroundSaver.wait` are collective: all ranks learn of the outcome at the same step.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.save import Order, SavePhase, write_checkpoint
from fp8train.checkpoint.snapshot import HostSnapshot

_SKEW = timedelta(hours=1)
"""How long the fastest writer waits for the slowest."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """A checkpoint that was written in the background and is safe now."""

    step: int
    path: Path
    num_bytes: int
    """Of all its files."""
    write_seconds: float
    """From the first byte to the pointer, on this rank."""


class BackgroundSaver:
    """Writes checkpoints in a thread while training goes on; at most one is in flight.

    Attributes:
        snapshot: the host buffers.
    """

    def __init__(self, control: dist.ProcessGroup | None) -> None:
        """Make the saver, with a process group for its threads; collective over all ranks of the job.

        Args:
            control: gloo group over all ranks, used by the main thread only; None for a single process.
        """
        self.snapshot = HostSnapshot()
        self._control = control
        self._own = None if control is None else dist.new_group(backend="gloo", timeout=_SKEW)
        self._work: _Work | None = None
        if control is None:
            from fp8train.checkpoint.shard_files import ignore_single_process_warning

            ignore_single_process_warning()  # once and here: the filter is not the thread's to change

    @property
    def step(self) -> int | None:
        """The step whose checkpoint is in flight; the same on all ranks."""
        return None if self._work is None else self._work.order.step

    def start(self, order: Order, tensors: Mapping[str, LogicalTensor]) -> None:
        """Copy ``tensors`` (see :func:`~fp8train.checkpoint.save.with_rank_state`) and begin to write them.

        Returns when they may change; nothing may be in flight.
        """
        assert self._work is None, f"the checkpoint of step {self.step} is in flight"
        copies = self.snapshot.take(tensors, Ranks(self._control))
        self._work = _Work(order, copies, Ranks(self._own))

    def poll(self) -> Written | None:
        """The checkpoint in flight if every rank is done with it, else None. Collective over ``control``
        while something is in flight; errors as in :meth:`wait`.
        """
        if self._work is None:
            return None
        waiting = torch.tensor([self._work.thread.is_alive()], dtype=torch.uint8)
        if self._control is not None:
            dist.all_reduce(waiting, op=dist.ReduceOp.MAX, group=self._control)
        return None if waiting.item() else self.wait()

    def wait(self) -> Written | None:
        """Wait for what is in flight; None if nothing is. Collective over ``control``.

        Raises:
            CheckpointError: it could not be saved, on every rank; the previous one is still the newest.
            Exception: any other error of the writer on its rank, ``RuntimeError`` on the others.
        """
        if self._work is None:
            return None
        work = self._work
        work.thread.join()
        self._work = None
        try:
            Ranks(self._control).agree(work.raise_error)
        except Exception:
            if work.error is None:
                raise
            raise work.error from None  # the writers have agreed on it already, so its message names the rank
        return work.written

    def abandon(self, *, grace_s: float) -> Written | None:
        """Training failed on this rank: let the write finish if it does so soon, else break it off. Not
        collective.

        Returns what was saved, if it was. Never raises and never takes much longer than ``grace_s`` seconds:
        a thread that is stuck in a collective or in the file system is left behind, and ends with the
        process.
        """
        if self._work is None:
            return None
        work, self._work = self._work, None
        work.thread.join(grace_s)
        if work.thread.is_alive():
            work.cancelled.set()
            work.thread.join(1.0)
        if work.written is None:
            reason = work.error or f"it was not done {grace_s:g} s later"
            _logger.warning("the checkpoint of step %d was not saved: %s", work.order.step, reason)
        return work.written


class _Work:
    """One save in flight."""

    def __init__(self, order: Order, tensors: dict[str, LogicalTensor], ranks: Ranks) -> None:
        self.cancelled = threading.Event()
        self._asked, self.order = order, replace(order, on_phase=self._on_phase)
        self.written: Written | None = None
        self.error: BaseException | None = None
        self._tensors, self._ranks = tensors, ranks
        # A daemon: a write that hangs must not keep a failed process alive.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            num_bytes = write_checkpoint(self.order, self._tensors, self._ranks, in_thread=True)
        except BaseException as error:  # raised again by wait(), in the main thread
            self.error = error
            return
        self.written = Written(self.order.step, self.order.final, num_bytes, time.perf_counter() - began)

    def _on_phase(self, phase: SavePhase) -> None:
        if self.cancelled.is_set():
            raise CheckpointError("broken off, because training failed")
        self._asked.on_phase(phase)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error
