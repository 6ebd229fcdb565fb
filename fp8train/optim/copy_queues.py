"""Queues of copies between host and device memory, beside the queue that computes.

A queue does its work in order and knows nothing of the others but what it waits for: a *mark* that another
queue passes. On a CUDA device queues are streams and marks are events; memory of the host is page-locked, so
that the copies of two directions run at once, and beside kernels. On a CPU each copy is done when it is asked
for. :mod:`fp8train.optim.host_states` says what waits for what; tests give it queues that are as late as they
may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Queue = Literal["compute", "in", "out"]
"""What the caller launches; copies to the device; copies to the host."""


class CopyQueues(Protocol):
    """Memory on two sides, and queues between them."""

    def host_memory(self, nbytes: int) -> Tensor:
        """Memory of the host: uint8 [nbytes], its content undefined."""
        ...

    def device_memory(self, nbytes: int) -> Tensor:
        """Memory of the device: uint8 [nbytes], its content undefined."""
        ...

    def copy(self, queue: Queue, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy each source to its target, behind everything that is in the queue."""
        ...

    def mark(self, queue: Queue) -> Any:
        """A mark that is passed once everything that is in the queue is done."""
        ...

    def wait(self, queue: Queue, mark: Any) -> None:
        """Hold what comes later in the queue until a mark is passed."""
        ...

    def settle(self) -> None:
        """Have the host wait until all copies are done."""
        ...


class CopiesAtOnce:
    """On a CPU, or on the meta device: there are no queues, and nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host_memory(self, nbytes: int) -> Tensor:
        """Memory like any other."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def device_memory(self, nbytes: int) -> Tensor:
        """Memory like any other, too."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, queue: Queue, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy now, in order."""
        del queue
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def mark(self, queue: Queue) -> None:
        """Everything is done already."""

    def wait(self, queue: Queue, mark: None) -> None:
        """Nothing is open."""

    def settle(self) -> None:
        """Nothing is open."""


class CudaCopies:
    """Streams of a CUDA device, one for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {"in": torch.cuda.Stream(device), "out": torch.cuda.Stream(device)}

    def host_memory(self, nbytes: int) -> Tensor:
        """Page-locked memory; torch rounds a block up to a power of two."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def device_memory(self, nbytes: int) -> Tensor:
        """Memory of the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, queue: Queue, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy on the queue's stream; the host does not wait."""
        context: AbstractContextManager[Any] = nullcontext()
        if queue != "compute":
            context = torch.cuda.stream(self._streams[queue])
        with context:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def mark(self, queue: Queue) -> torch.cuda.Event:
        """An event behind what is in the queue."""
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: Queue, mark: torch.cuda.Event) -> None:
        """The device waits for the event; the host does not."""
        self._stream(queue).wait_event(mark)

    def settle(self) -> None:
        """Synchronise both streams."""
        for stream in self._streams.values():
            stream.synchronize()

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        """``compute`` is the stream that is current now: backward has its own way to choose one."""
        return torch.cuda.current_stream(self._device) if queue == "compute" else self._streams[queue]


def copy_queues(device: torch.device) -> CopyQueues:
    """The queues of a device."""
    return CudaCopies(device) if device.type == "cuda" else CopiesAtOnce(device)
