"""Who receives the sum of a bucket's gradients, and where each parameter lies on the way there.

A bucket's memory is counted in *units*: elements, or blocks of a row. A rank's own contribution holds all
rows of all members, one after the other. Everyone receives the same, or of :class:`Owners` (ZeRO) each the
rows that it owns, so a message is arranged by owner first, and parts are padded to the longest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.parallel.zero import Partition, Rows


@dataclass(frozen=True)
class Member:
    """A parameter in a bucket: fully qualified name and local shape."""

    fqn: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of local elements."""
        return torch.Size(self.shape).numel()


class Places:
    """Where the members of a bucket lie, in units.

    Attributes:
        members: of the bucket, all rows of each.
        whole: place of each member in a rank's own contribution.
        total: units of that, padding included.
        held: place of the rows of each member that this rank receives, in what it receives.
        rows: which rows those are.
        starts: first unit of them within its member.
        scattered: whether ranks receive different rows.
    """

    scattered = False

    def __init__(self, members: Sequence[Member], row_units: Sequence[int], *, pad_to: int = 1) -> None:
        """Arrange the members one after the other, for ranks that receive all rows.

        Args:
            members: parameters.
            row_units: units of one row (of the first dimension) of each.
            pad_to: the total becomes a multiple of it.
        """
        self.members, self.whole = list(members), list[slice]()
        end = 0
        for member, unit in zip(members, row_units, strict=True):
            self.whole.append(slice(end, end + member.shape[0] * unit))
            end += member.shape[0] * unit
        self.total = -(-end // pad_to) * pad_to
        self.held: list[slice] = self.whole
        self.rows = [Rows(0, member.shape[0]) for member in members]
        self.starts = [0] * len(members)

    @property
    def message(self) -> int:
        """Units of what a rank sends to be reduced."""
        return self.total

    def held_shape(self, member: int) -> tuple[int, ...]:
        """Shape of the part of a member that this rank receives."""
        return (len(self.rows[member]), *self.members[member].shape[1:])

    def arrange(self, x: Tensor, fill: int = 0) -> Tensor:
        """Turn a rank's own contribution [total, ..] into the message that it sends; here they are the same.
        Padding is ``fill``."""
        return x


class OwnedPlaces(Places):
    """Where members lie when each owner receives only its rows (ZeRO).

    Attributes:
        part: units of one owner's part of a message.
    """

    scattered = True

    def __init__(self, members: Sequence[Member], row_units: Sequence[int], owners: Owners) -> None:
        """Arrange the members' rows by owner. Arguments as for :class:`Places`; ``owners`` has the rows of
        each."""
        super().__init__(members, row_units)
        self._parts: list[list[slice]] = []
        self.held, lengths = [], []
        for owner in owners.order:
            slices, places, end = [], [], 0
            for member, whole, unit in zip(members, self.whole, row_units, strict=True):
                rows = owners.partition.owners[member.fqn][owner]
                slices.append(slice(whole.start + rows.start * unit, whole.start + rows.stop * unit))
                places.append(slice(end, end + len(rows) * unit))
                end += len(rows) * unit
            self._parts.append(slices)
            lengths.append(end)
            if owner == owners.rank:
                self.held = places
        self.part = max(lengths)
        self.rows = [owners.partition.owners[member.fqn][owners.rank] for member in members]
        self.starts = [rows.start * unit for rows, unit in zip(self.rows, row_units, strict=True)]

    @property
    def message(self) -> int:
        """Units of what a rank sends: a part for each owner, as long as the longest."""
        return self.part * len(self._parts)

    def arrange(self, x: Tensor, fill: int = 0) -> Tensor:
        """Turn a rank's own contribution [total, ..] into a message by owner, [owners · part, ..], padded
        with ``fill``."""
        message = x.new_full((len(self._parts), self.part, *x.shape[1:]), fill)
        for row, slices in zip(message, self._parts, strict=True):
            pieces = [x[piece] for piece in slices if piece.stop > piece.start]
            if pieces:
                joined = torch.cat(pieces)
                row[: len(joined)] = joined
        return message.view(-1, *x.shape[1:])


@dataclass(frozen=True)
class Owners:
    """Each rank receives the rows whose optimizer states it keeps.

    Attributes:
        partition: who owns what.
        rank: this one's number among the owners.
        order: in which the owners' parts lie in a message. Not theirs by number where a sum is formed in two
            levels: there all nodes' ranks of one place lie together, as each place reduces for them first.
    """

    partition: Partition
    rank: int
    order: Sequence[int]


def places_of(
    owners: Owners | None, members: Sequence[Member], row_units: Sequence[int], *, pad_to: int = 1
) -> Places:
    """Arrange the members of a bucket, whose sum the owners of its rows receive, or everyone (None). Other
    arguments as for :class:`Places`; owners' parts are of one length anyway: ``pad_to`` asks nothing more."""
    if owners is None:
        return Places(members, row_units, pad_to=pad_to)
    return OwnedPlaces(members, row_units, owners)


def by_place_in_node(ranks: int, node_size: int) -> tuple[int, ...]:
    """Order of the owners' parts in the message of a reduction in two levels over nodes of consecutive ranks:
    by place in the node, then by node."""
    return tuple(rank for place in range(node_size) for rank in range(place, ranks, node_size))


def row_elements(members: Sequence[Member]) -> list[int]:
    """Number of elements in one row (of the first dimension) of each member."""
    return [math.prod(member.shape[1:]) for member in members]
