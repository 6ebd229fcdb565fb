"""A bucket: parameters whose gradients are stored alike and reduced together.

It owns consecutive parameters of one kind. The gradient store decides *when* (it counts contributions and
launches buckets in one order on all ranks); the storage decides how contributions add up, the reduction how
the sum over ranks is formed, and the :class:`~fp8train.parallel.gradients.held.Held` that it returns is what
the optimizer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fp8train.parallel.gradients.held import GradientReader, Held, HeldValues, StoredGradient
from fp8train.parallel.gradients.receivers import Places

Norms = Callable[[Sequence[Tensor]], Tensor]
"""Euclidean norm of each of many flat tensors in high precision: FP32 [tensors], or wider."""


class Storage(Protocol):
    """How one rank's contributions to the parameters of a bucket add up. ``member`` is a position in
    ``places.members``."""

    places: Places

    @property
    def stored_bytes(self) -> int:
        """Bytes that are kept between steps, scales included."""
        ...

    @property
    def scale_bytes(self) -> int:
        """What of :attr:`stored_bytes` is scales."""
        return 0

    @property
    def accumulator_bytes(self) -> int:
        """Bytes that are needed beside :attr:`stored_bytes` while micro-batches add up."""
        return 0

    def begin(self) -> None:
        """Begin a step, and forget what an unfinished one left; the first contribution overwrites."""
        return None

    def buffer(self, member: int) -> Tensor:
        """The memory that a contribution changes, of the parameter's shape: declared to the compiler, never
        read."""
        ...

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Take one micro-batch's gradient; ``first`` of the step overwrites."""
        ...

    def own_sum(self) -> Tensor:
        """One number that stands for all contributions of this rank, before the reduction: not finite if they
        are not, the same for the same bits, most likely another for others. Any dtype."""
        ...

    def commit(self, clip: Tensor | None) -> None:
        """Learn that the step was applied, its gradient multiplied by ``clip`` (None: by 1)."""
        return None


class Reduction(Protocol):
    """How a bucket's sum over ranks is formed. Ranks call the three methods in the same order for all
    buckets."""

    def start(self) -> None:
        """Post the first communication; every contribution of this rank is in."""
        ...

    def advance(self) -> None:
        """Do what the first communication enables and post the next; called once."""
        ...

    def finish(self) -> Held:
        """Wait for the last communication and return this rank's reduced gradients."""
        ...


@dataclass(frozen=True)
class _Reader:
    held: Held
    member: int
    offset: int

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.held.chunk(self.member, self.offset + start, self.offset + stop)

    def stored(self, count: int) -> StoredGradient | None:
        return self.held.stored(self.member, self.offset, self.offset + count)


class Bucket:
    """Parameters whose gradients one storage adds up over micro-batches and one reduction over ranks.

    Attributes:
        storage: where this rank's contributions add up.
        members: the parameters of the bucket, in the order in which they lie in memory.
        scattered: whether each rank receives only the rows of the sum that it owns (ZeRO).
        watched: whether :attr:`own_sum` is kept, which reads the contributions once.
        own_sum: FP64 scalar, see :meth:`Storage.own_sum`; after :meth:`launch`.
    """

    watched = False
    own_sum: Tensor

    def __init__(self, storage: Storage, reduction: Reduction, *, norms: Norms | None = None) -> None:
        """Join a storage and the reduction that was made for it. ``norms``: of gradients in high precision,
        in place of our own."""
        self.storage, self._reduction, self._norms = storage, reduction, norms
        self.members, self.scattered = storage.places.members, storage.places.scattered
        self._held: Held | None = None

    def begin(self) -> None:
        """Begin a step: drop the last result and what an unfinished step left."""
        self._held = None
        self.storage.begin()

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Add one micro-batch's gradient of a member; the ``first`` of the step overwrites."""
        self._held = None
        self.storage.add(member, gradient, first=first)

    def launch(self) -> None:
        """Start the reduction: every contribution is in, and the first communication is posted."""
        if self.watched:
            self.own_sum = self.storage.own_sum().double()
        self._reduction.start()

    def advance(self) -> None:
        """Do the second half of the reduction, if it has one: what has arrived is added and sent on."""
        self._reduction.advance()

    def finish(self) -> None:
        """Wait for the reduced gradients; :attr:`held` has them from here on."""
        self._held = self._reduction.finish()

    @property
    def held(self) -> Held:
        """The reduced gradients; after :meth:`finish`, and where they are scattered until :meth:`release`."""
        assert self._held is not None, "not reduced, or released"
        return self._held

    def reader(self, member: int, *, offset: int = 0) -> GradientReader:
        """The reduced gradient in pieces, of this rank's rows; from element ``offset`` of them on."""
        return _Reader(self.held, member, offset)

    def values(self, member: int) -> Tensor:
        """Memory of a reduced gradient in high precision, flat: writing changes it."""
        assert isinstance(self._held, HeldValues), "only gradients in high precision are values in memory"
        return self._held.values(member)

    def norms(self, dtype: torch.dtype) -> Tensor:
        """Euclidean norm of this rank's rows of each member, FP64 [members]; NaN if the gradient is not
        finite. ``dtype``: of the arithmetic, or narrower than it."""
        held = self.held
        if self._norms is not None and isinstance(held, HeldValues):
            return self._norms([held.values(member) for member in range(len(held.parts))]).double()
        return held.norms(dtype)

    def drop(self) -> None:
        """Forget the reduced gradients: their memory may go to others."""
        self._held = None

    def release(self) -> None:
        """The optimizer has read the gradients: free what is not kept between steps."""
        if self.scattered:
            self.drop()

    def commit(self, clip: Tensor | None = None) -> None:
        """Tell the storage that the step was applied, its gradient multiplied by ``clip``, a device scalar
        (None: by 1)."""
        self.storage.commit(clip)
