"""Which collectives this process has entered and left, by group, and which it waits in.

A rank that does not come is seen by counts: who waits in the n-th collective of a group waits for those of
its members that have entered fewer. So every group counts, whoever hangs later; the thread that does only
sets attributes, another reads them (:mod:`fp8train.watch`). That costs two readings of a clock per wait.

With gloo a wait holds the host. With NCCL it holds the device, and the host goes on: a rank then enters all
collectives of a step and stands where it reads the result. Counts tell who is behind in both cases;
``waited_s`` is what the host waited, so nearly nothing with NCCL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wait:
    """What a rank waits in.

    Attributes:
        number: of the call within its group, from 1.
        what: ``all_reduce/gradient``.
        peers: global ranks that it depends on; None: all of the group.
    """

    number: int
    what: str
    peers: tuple[int, ...] | None = None


@dataclass
class GroupCalls:
    """The calls of one kind over one group of ranks.

    Attributes:
        name: of the group; with a suffix where calls of another kind are counted apart: ``pp hop``, a message
            to one rank while one comes from another; ``pp schedule``, a pipeline's whole step.
        ranks: global ranks of the group.
        calls: of the process.
        entered: calls begun.
        left: calls waited for.
        waiting: the one that holds the host now.
    """

    name: str
    ranks: tuple[int, ...]
    calls: Calls
    entered: int = 0
    left: int = 0
    waiting: Wait | None = None

    def begun(
        self, what: str, wait: Callable[[], object], *, peers: tuple[int, ...] | None = None
    ) -> Callable[[], None]:
        """A call has begun; returns ``wait`` with the wait noted."""
        self.entered += 1
        entry = Wait(self.entered, what, peers)

        def waited() -> None:
            with self._waiting(entry):
                wait()

        return waited

    @contextmanager
    def held(self, what: str, *, peers: tuple[int, ...] | None = None) -> Iterator[None]:
        """Inside is a call that begins, and holds the host until it is done."""
        self.entered += 1
        with self._waiting(Wait(self.entered, what, peers)):
            yield

    @contextmanager
    def not_waiting(self) -> Iterator[None]:
        """Inside a call that mostly waits, this rank computes for a while."""
        outside, began = self.waiting, time.perf_counter()
        self.waiting = None
        try:
            yield
        finally:
            self.waiting = outside
            if outside is not None:
                self.calls.waited_s -= time.perf_counter() - began

    @contextmanager
    def _waiting(self, entry: Wait) -> Iterator[None]:
        began = time.perf_counter()
        self.waiting = entry
        try:
            yield
        finally:  # of a call that failed too: it holds nobody any more
            self.waiting = None
            self.calls.waited_s += time.perf_counter() - began
            self.left += 1


@dataclass
class Calls:
    """All calls of a process.

    Attributes:
        groups: in the order in which they were made.
        waited_s: seconds that its host waited in them.
    """

    groups: list[GroupCalls] = field(default_factory=list)
    waited_s: float = 0.0

    def group(self, name: str, ranks: Sequence[int]) -> GroupCalls:
        """Count the calls over these global ranks from now on."""
        made = GroupCalls(name, tuple(ranks), self)
        self.groups.append(made)
        return made

    @property
    def moves(self) -> int:
        """Grows with every call that is entered or left."""
        return sum(group.entered + group.left for group in self.groups)
