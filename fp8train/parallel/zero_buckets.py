"""Buckets whose sum goes to the owners only: half of an all-reduce, and no second cast.

Every rank contributes gradients of whole tensors and receives the sum of the rows that it owns
(:mod:`fp8train.parallel.zero`). Inside a message, rows lie by owner; parts are padded to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import pack, sum_parts
from fp8train.numerics.blocks import from_blocks
from fp8train.numerics.formats import Format
from fp8train.parallel.buckets import GradientReader, GradientRecorder, Member, PlainBucket, TensorReader
from fp8train.parallel.fp8_buckets import Fp8Bucket
from fp8train.parallel.zero import Partition, Rows


class OwnerOrder:
    """Where the rows of a bucket's members lie in a message with one part per owner.

    Attributes:
        part: length of a part, in units.
        own: rows of each member that this rank owns.
    """

    def __init__(
        self,
        members: Sequence[Member],
        starts: Sequence[int],
        units: Sequence[int],
        plan: Partition,
        rank: int,
    ) -> None:
        """Arrange.

        Args:
            members: of the bucket.
            starts: unit at which each member begins in the bucket.
            units: units of one row of each member.
            plan: owners.
            rank: this one's number among them.
        """
        self._parts: list[list[slice]] = []
        self._places: dict[int, slice] = {}
        lengths = []
        for owner in range(plan.ranks):
            slices, end = [], 0
            for member, start, unit in zip(members, starts, units, strict=True):
                rows = plan.owners[member.fqn][owner]
                slices.append(slice(start + rows.start * unit, start + rows.stop * unit))
                if owner == rank:
                    self._places[len(slices) - 1] = slice(end, end + len(rows) * unit)
                end += len(rows) * unit
            self._parts.append(slices)
            lengths.append(end)
        self.part = max(lengths)
        self.own: list[Rows] = [plan.owners[member.fqn][rank] for member in members]

    def arrange(self, x: Tensor, fill: int = 0) -> Tensor:
        """The message: units of the bucket [units, ..] -> [owners · part, ..]; padding is ``fill``."""
        message = x.new_full((len(self._parts), self.part, *x.shape[1:]), fill)
        for row, slices in zip(message, self._parts, strict=True):
            pieces = [x[piece] for piece in slices if piece.stop > piece.start]
            if pieces:
                joined = torch.cat(pieces)
                row[: len(joined)] = joined
        return message.view(-1, *x.shape[1:])

    def place(self, member: int) -> slice:
        """Where this rank's rows of a member lie in its part."""
        return self._places[member]


def _own_shape(member: Member, rows: Rows) -> tuple[int, ...]:
    return (len(rows), *member.shape[1:])


class OwnedFp8Bucket(Fp8Bucket):
    """FP8 codes with block scales on the wire, FP32 sums at the owner."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        block: int,
        fmt: Format,
        accumulate: torch.dtype | None,
        plan: Partition,
        group: CountedGroup,
        purpose: str,
        error_feedback: bool = False,
        recorder: GradientRecorder | None = None,
        device: torch.device,
    ) -> None:
        """As :class:`Fp8Bucket`; ``plan``: owners in ``group``; ``purpose``: name in the byte counters."""
        super().__init__(
            members,
            block=block,
            fmt=fmt,
            accumulate=accumulate,
            reduction=None,
            parts=1,
            error_feedback=error_feedback,
            recorder=recorder,
            device=device,
        )
        self._group, self._purpose = group, purpose
        units = [-(-member.shape[-1] // block) for member in members]
        starts = [rows.start for rows in self._ranges]
        self._order = OwnerOrder(members, starts, units, plan, group.rank)
        self._received: Tensor | None = None
        self._wait: Callable[[], None] | None = None
        self._sums: Tensor | None = None

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`: cast, and send every owner its rows."""
        super().launch()
        self._sums = None
        payload = self._order.arrange(self._payload.view(torch.uint8))
        scales = self._order.arrange(self._scales, fill=127)
        message = pack(payload.view(self._format.dtype), scales, self._group.size)
        self._received = torch.empty_like(message)
        self._wait = self._group.all_to_all(self._received, message, purpose=self._purpose)

    def advance(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`: add what arrived."""
        assert self._wait is not None
        assert self._received is not None
        self._wait()
        self._sums = sum_parts(self._received, self._block, self._format.dtype)
        self._received = self._wait = None

    def finish(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`; :meth:`advance` did it all."""
        self._reduced = True

    def release(self) -> None:
        """Free the sums until the next step."""
        self._sums = None

    def _own(self, member: int) -> Tensor:
        """FP32 sum of this rank's rows."""
        assert self._sums is not None
        shape = _own_shape(self.members[member], self._order.own[member])
        return from_blocks(self._sums[self._order.place(member)], shape)

    def reader(self, member: int) -> GradientReader:
        """See :class:`~fp8train.parallel.buckets.Bucket`; of this rank's rows."""
        return TensorReader(self._own(member).reshape(-1))

    def grad(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; after the reduction zero in rows of other ranks."""
        if not self._reduced:
            return super().grad(member)
        rows = self._order.own[member]
        whole = torch.zeros(self.members[member].shape, device=self._scales.device)
        whole[rows.start : rows.stop] = self._own(member)
        return whole

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; of this rank's rows."""
        return torch.linalg.vector_norm(self._own(member), dtype=dtype)


class OwnedPlainBucket(PlainBucket):
    """High precision: a reduce-scatter in ``reduce``."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        accumulate: torch.dtype,
        reduce: torch.dtype,
        plan: Partition,
        group: CountedGroup,
        purpose: str = "gradient",
        device: torch.device,
    ) -> None:
        """As :class:`PlainBucket`; ``plan``: owners in ``group``; ``purpose``: name in the byte counters."""
        super().__init__(members, accumulate=accumulate, reduce=reduce, group=group, device=device)
        self._purpose = purpose
        rows = [math.prod(member.shape[1:]) for member in members]
        starts = [int(view.storage_offset()) for view in self._views]
        self._order = OwnerOrder(members, starts, rows, plan, group.rank)
        self._result: Tensor | None = None
        self._reduced = False

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        self._reduced = False
        super().add(member, gradient, first=first)

    def launch(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        self._wire = self._order.arrange(self._flat.to(self._reduce)).view(self._group.size, -1)
        self._result = torch.empty_like(self._wire[0])
        self._wait = self._group.reduce_scatter(self._result, self._wire, purpose=self._purpose)

    def finish(self) -> None:
        """See :class:`~fp8train.parallel.buckets.Bucket`."""
        assert self._wait is not None
        self._wait()
        self._wire = self._wait = None
        self._reduced = True

    def release(self) -> None:
        """Free the sums until the next step."""
        self._result = None

    def own(self, member: int) -> Tensor:
        """The sum of this rank's rows, flat, in the dtype on the wire; writing changes it."""
        assert self._result is not None
        return self._result[self._order.place(member)]

    def reader(self, member: int) -> GradientReader:
        """See :class:`~fp8train.parallel.buckets.Bucket`; of this rank's rows."""
        return TensorReader(self.own(member))

    def grad(self, member: int) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; after the reduction zero in rows of other ranks."""
        if not self._reduced:
            return super().grad(member)
        rows = self._order.own[member]
        whole = torch.zeros_like(self._views[member])
        shape = _own_shape(self.members[member], rows)
        whole[rows.start : rows.stop] = self.own(member).view(shape).to(whole.dtype)
        return whole

    def norm(self, member: int, dtype: torch.dtype) -> Tensor:
        """See :class:`~fp8train.parallel.buckets.Bucket`; of this rank's rows."""
        return torch.linalg.vector_norm(self.own(member), dtype=dtype)
