"""Sums over ranks in high precision: an all-reduce, or a reduce-scatter to the owners."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.gradients.block_storage import BlockStorage
from fp8train.parallel.gradients.held import Held, HeldValues
from fp8train.parallel.gradients.wide_storage import WideStorage


class WideSum:
    """Reduces a bucket in high precision by one collective (a
    :class:`~fp8train.parallel.gradients.bucket.Reduction`)."""

    def __init__(
        self, storage: WideStorage | BlockStorage, group: CountedGroup, *, dtype: torch.dtype, purpose: str
    ) -> None:
        """Reduce over ``group``. Args: ``dtype``: on the wire; ``purpose``: name in the byte counters."""
        self._storage, self._places, self._group = storage, storage.places, group
        self._dtype, self._purpose = dtype, purpose
        self._wire: Tensor | None = None
        self._received: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def start(self) -> None:
        """Start to add the sums of all ranks in ``dtype``: an all-reduce, or under ZeRO a reduce-scatter."""
        sums = self._storage.wide()
        wire = sums if sums.dtype == self._dtype else sums.to(self._dtype)
        if self._places.scattered:
            self._wire = self._places.arrange(wire).view(self._group.size, -1)
            self._received = torch.empty_like(self._wire[0])
            self._wait = self._group.reduce_scatter(self._received, self._wire, purpose=self._purpose)
        else:
            self._wire = wire
            self._wait = self._group.all_reduce(wire, purpose=self._purpose)

    def advance(self) -> None:
        """Do nothing: one collective does it all."""

    def finish(self) -> Held:
        """Wait for the sums. Where everyone receives them the storage keeps them; owners get them in the type
        on the wire."""
        assert self._wait is not None
        assert self._wire is not None
        self._wait()
        wire, received = self._wire, self._received
        self._wire = self._received = self._wait = None
        if received is None:
            return self._storage.hold(wire)
        return HeldValues([received[place] for place in self._places.held])
