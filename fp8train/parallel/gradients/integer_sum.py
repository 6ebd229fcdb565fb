"""Sums over ranks of integers, which are exact: an all-reduce, or a reduce-scatter to the owners.

With one micro-batch a rank, FP8 codes travel: an all-to-all of bytes, the sum of each rank's part in INT32,
and where everyone is to have it an all-gather of INT32 (5 bytes an element instead of 8; owners: 1 instead of
4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.numerics.formats import dtype_of
from fp8train.parallel.gradients.grids import CODE_UNIT, HeldSums, code_integers
from fp8train.parallel.gradients.integer_storage import IntegerStorage
from fp8train.precision.number_formats import E4M3

PURPOSE = "gradient_exact"


class IntegerSum:
    """Reduces integer sums by NCCL's or gloo's own addition, which is exact (a
    :class:`~fp8train.parallel.gradients.bucket.Reduction`)."""

    def __init__(self, storage: IntegerStorage, group: CountedGroup) -> None:
        """Reduce ``storage`` over ``group``, the data-parallel ranks."""
        self._storage, self._group = storage, group
        self._sent: Tensor | None = None
        self._sums: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def start(self) -> None:
        """Start to add the sums of all ranks: an all-reduce in place, or under ZeRO a reduce-scatter."""
        sums, places = self._storage.integers(), self._storage.places
        if not places.scattered:
            self._sums = sums
            self._wait = self._group.all_reduce(sums, purpose=PURPOSE)
            return
        self._sent = places.arrange(sums).view(self._group.size, -1)
        self._sums = torch.empty_like(self._sent[0])
        self._wait = self._group.reduce_scatter(self._sums, self._sent, purpose=PURPOSE)

    def advance(self) -> None:
        """Do nothing: one collective does it all."""

    def finish(self) -> HeldSums:
        """Wait for the collective and return the sums, of all rows or of those that this rank owns."""
        assert self._wait is not None
        assert self._sums is not None
        self._wait()
        sums = self._sums
        self._wait = self._sums = self._sent = None
        return self._storage.hold(sums)


class CodeSum:
    """Reduces sums that are one E4M3 code each: bytes travel, integers are added (a
    :class:`~fp8train.parallel.gradients.bucket.Reduction`)."""

    def __init__(self, storage: IntegerStorage, group: CountedGroup) -> None:
        """Reduce ``storage`` over ``group``, the data-parallel ranks."""
        self._storage, self._group = storage, group
        self._received: Tensor | None = None
        self._part: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def start(self) -> None:
        """Send every rank the codes of its part: one byte per element."""
        sums = self._storage.places.arrange(self._storage.integers())
        # Integers that are one code each are that code again: exact both ways.
        codes = (sums.float() * 2.0**CODE_UNIT).to(dtype_of(E4M3)).view(torch.uint8)
        codes = codes.view(self._group.size, -1)
        self._received = torch.empty_like(codes)
        self._wait = self._group.all_to_all(self._received, codes, purpose=PURPOSE)

    def advance(self) -> None:
        """Add what arrived, and send the sums to everyone if everyone is to have them."""
        assert self._wait is not None
        assert self._received is not None
        self._wait()
        self._part = code_integers(self._received.view(dtype_of(E4M3))).sum(dim=0, dtype=torch.int32)
        self._received = self._wait = None
        if not self._storage.places.scattered:
            everything = self._storage.integers().view(self._group.size, -1)
            self._wait = self._group.all_gather(everything, self._part, purpose=PURPOSE)

    def finish(self) -> HeldSums:
        """Wait for the last collective and return the sums, of all rows or of those that this rank owns."""
        assert self._part is not None
        part, self._part = self._part, None
        if self._wait is None:
            return self._storage.hold(part)
        self._wait()
        self._wait = None
        return self._storage.hold(self._storage.integers())
