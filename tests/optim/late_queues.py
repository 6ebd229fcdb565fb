"""Copy queues for a CPU that do what streams of a GPU may do at worst.

A copy is done as late as what waits for it allows, and memory of the device holds NaN before its first copy
and behind its last one. Who reads or writes memory of a copy must also wait for those that used it before:
this is checked of every access by vector clocks, for which of two unordered accesses comes first on a GPU
is chance.

A queue's clock says how much of each queue's work is done by the time it goes on. What the caller computes
with is what it has waited for and not put a mark behind yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.optim.copy_queues import Queue

Clock = Mapping[str, int]
QUEUES: tuple[Queue, ...] = ("compute", "in", "out")


class Race(AssertionError):
    """Two uses of the same memory that nothing keeps in order."""


@dataclass(frozen=True)
class Mark:
    """Passed when ``place`` entries of a queue are done."""

    queue: Queue
    place: int
    clock: Clock


@dataclass(frozen=True)
class _Use:
    queue: Queue
    time: int
    start: int
    stop: int
    writes: bool


class LateQueues:
    """See the module.

    Attributes:
        host_bytes: memory of the host that was given out.
        device_bytes: of the device.
        copied: bytes that each queue has copied.
    """

    def __init__(self, *, forget: tuple[Queue, Queue] | None = None, check: bool = True) -> None:
        """``forget``: (a queue, the one whose marks it does not wait for); ``check``: raise :class:`Race`."""
        self._forget, self._check = forget, check
        self._entries: dict[Queue, deque[tuple[Sequence[Tensor], Sequence[Tensor]] | Mark]] = {
            queue: deque() for queue in QUEUES
        }
        self._done, self._asked = dict.fromkeys(QUEUES, 0), dict.fromkeys(QUEUES, 0)
        self._clocks: dict[Queue, dict[str, int]] = {queue: dict.fromkeys(QUEUES, 0) for queue in QUEUES}
        self._uses: list[_Use] = []
        self._arriving: dict[int, Sequence[Tensor]] = {}
        self._held: list[Tensor] = []
        self._memory: list[Tensor] = []  # so that addresses stay what they are
        self.host_bytes = self.device_bytes = 0
        self.copied = dict.fromkeys(QUEUES, 0)

    def host_memory(self, nbytes: int) -> Tensor:
        self.host_bytes += nbytes
        return self._poisoned(nbytes)

    def device_memory(self, nbytes: int) -> Tensor:
        self.device_bytes += nbytes
        return self._poisoned(nbytes)

    def _poisoned(self, nbytes: int) -> Tensor:
        self._memory.append(torch.full((nbytes,), 0xFF, dtype=torch.uint8))
        return self._memory[-1]

    def copy(self, queue: Queue, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._used(queue, sources, writes=False)
        self._used(queue, targets, writes=True)
        self.copied[queue] += sum(source.nbytes for source in sources)
        self._entries[queue].append((targets, sources))
        self._asked[queue] += 1
        if queue == "in":
            self._arriving[self._asked[queue]] = targets

    def mark(self, queue: Queue) -> Mark:
        if queue == "compute":
            self._used(queue, self._held, writes=True)
            self._held = []
        return Mark(queue, self._asked[queue], dict(self._clocks[queue]))

    def wait(self, queue: Queue, mark: Mark) -> None:
        if (queue, mark.queue) == self._forget:
            self._receive(queue, mark)
            return
        clock = self._clocks[queue]
        for name, time in mark.clock.items():
            clock[name] = max(clock[name], time)
        if queue == "compute":
            self._run(mark.queue, mark.place)
        else:
            self._entries[queue].append(mark)
            self._asked[queue] += 1
        self._receive(queue, mark)

    def settle(self) -> None:
        for queue in QUEUES:
            self._run(queue, self._asked[queue])
            for name, time in self._clocks[queue].items():
                for other in QUEUES:
                    self._clocks[other][name] = max(self._clocks[other][name], time)

    def _receive(self, queue: Queue, mark: Mark) -> None:
        """What the caller computes with from now on."""
        if queue == "compute":
            if mark.queue == "in":
                self._held += self._arriving.pop(mark.place, ())
            self._used(queue, self._held, writes=True)

    def _run(self, queue: Queue, place: int) -> None:
        while self._done[queue] < place:
            entry = self._entries[queue].popleft()
            if isinstance(entry, Mark):
                self._run(entry.queue, entry.place)
            else:
                for target, source in zip(*entry, strict=True):
                    target.copy_(source)
                    if queue == "out":
                        source.fill_(0xFF)
            self._done[queue] += 1

    def _used(self, queue: Queue, tensors: Sequence[Tensor], *, writes: bool) -> None:
        clock = self._clocks[queue]
        clock[queue] += 1
        if not self._check:
            return
        for tensor in tensors:
            use = _Use(queue, clock[queue], tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, writes)
            kept = []
            for other in self._uses:
                overlaps = other.start < use.stop and use.start < other.stop
                if overlaps and (other.writes or writes) and clock[other.queue] < other.time:
                    raise Race(f"{queue} uses memory that {other.queue} may be using still")
                covered = use.start <= other.start and other.stop <= use.stop and writes
                if not covered:
                    kept.append(other)
            self._uses = [*kept, use]
