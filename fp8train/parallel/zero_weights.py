"""New weights from their ZeRO owners to everyone.

After the optimizer step each rank has the new values of the rows that it owns. They travel in groups of
consecutive parameters, in the order in which forward needs them: FP8-resident weights as the codes that the
GEMM reads (1 byte; their scales were agreed on, so nobody sends them), all others in the compute type. A
layer's weights are waited for where they are used (:meth:`WeightGather.wait`), so that the gather overlaps
with the forward pass before it.

Few groups are on their way at once, which bounds the memory of what arrives: all of them would be the model
once more. The next one starts when one was waited for. So what a rank waits for decides the order of
collectives, and must be the same on all ranks: they run the same forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.zero import Partition

_ON_THEIR_WAY = 4
"""Groups at once, at most: while one is used, the next ones travel."""


@dataclass(frozen=True)
class Matrix:
    """Memory of one weight that every rank holds whole.

    Attributes:
        fqn: whose.
        values: [rows, ..], not necessarily contiguous; FP8 codes as uint8.
        encode: from what travels to what is stored, and ``decode`` back; None sends what is stored.
    """

    fqn: str
    values: Tensor
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """What travels of rows ``start .. stop``: flat, in the type on the wire."""
        rows = self.values[start:stop]
        return (rows if self.decode is None else self.decode(rows)).reshape(-1)

    def write(self, start: int, stop: int, sent: Tensor) -> None:
        """Store what arrived for rows ``start .. stop``."""
        rows = self.values[start:stop]
        values = sent.view(rows.shape)
        rows.copy_(values if self.encode is None else self.encode(values))


@dataclass(eq=False)
class _Group:
    matrices: list[Matrix]
    part: int
    purpose: str
    wait: Callable[[], None] | None = None
    arrived: Tensor | None = None


class WeightGather:
    """All-gathers of all weights; :meth:`start` after each update, :meth:`wait` before each use."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        plan: Partition,
        group: CountedGroup,
        *,
        bucket_bytes: float,
        purposes: Mapping[str, str],
    ) -> None:
        """Arrange the weights in messages.

        Args:
            matrices: in the order of use.
            plan: owners in ``group``.
            group: ranks.
            bucket_bytes: size of a message, approximately.
            purposes: name in the byte counters of each weight; weights of other names share no message.
        """
        self._plan, self._group = plan, group
        self._groups: list[_Group] = []
        self._travelling: deque[_Group] = deque()
        self._of: dict[str, list[int]] = {}
        open_groups: dict[tuple[torch.dtype, str], tuple[int, int]] = {}
        for matrix in matrices:
            sent = matrix.read(0, 0)
            kind = sent.dtype, purposes[matrix.fqn]
            number, size = open_groups.get(kind, (-1, 0))
            nbytes = matrix.values.numel() * sent.element_size()
            if number < 0 or size + nbytes > bucket_bytes:
                number, size = len(self._groups), 0
                self._groups.append(_Group([], 0, purposes[matrix.fqn]))
            self._groups[number].matrices.append(matrix)
            open_groups[kind] = (number, size + nbytes)
            self._of.setdefault(matrix.fqn, []).append(number)
        for one in self._groups:
            one.part = max(
                sum(self._rows(matrix, rank)[2] for matrix in one.matrices) for rank in range(plan.ranks)
            )
        self._next = len(self._groups)  # the next to start

    def _rows(self, matrix: Matrix, rank: int) -> tuple[int, int, int]:
        """(first row, row after the last, elements) that ``rank`` owns."""
        rows = self._plan.owners[matrix.fqn][rank]
        row = matrix.values[0].numel() if len(matrix.values) else 0
        return rows.start, rows.stop, len(rows) * row

    def start(self) -> None:
        """Start to send the new rows that this rank owns; every rank calls this at the same point. They must
        not change until all of them were waited for, or this is called again, which sends all anew."""
        while self._travelling:
            self._finish(self._travelling[0])
        self._next = 0
        self._send()

    def wait(self, fqn: str) -> None:
        """Wait until all rows of this weight are here, and store them. Every rank waits for the same weights
        in the same order."""
        for number in self._of[fqn]:
            while self._next <= number:
                self._finish(self._travelling[0])
                self._send()
            self._finish(self._groups[number])
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        while self._next < len(self._groups) and len(self._travelling) < _ON_THEIR_WAY:
            one = self._groups[self._next]
            pieces = [matrix.read(*self._rows(matrix, self._group.rank)[:2]) for matrix in one.matrices]
            own = torch.cat(pieces)
            message = own.new_zeros(one.part)
            message[: len(own)] = own
            one.arrived = message.new_empty(self._group.size, one.part)
            one.wait = self._group.all_gather(one.arrived, message, purpose=one.purpose)
            self._travelling.append(one)
            self._next += 1

    @torch.no_grad()
    def _finish(self, one: _Group) -> None:
        if one.wait is None:
            return
        one.wait()
        assert one.arrived is not None
        for rank, message in enumerate(one.arrived):
            if rank == self._group.rank:
                continue
            offset = 0
            for matrix in one.matrices:
                start, stop, elements = self._rows(matrix, rank)
                if elements:
                    matrix.write(start, stop, message[offset : offset + elements])
                offset += elements
        one.wait = one.arrived = None
        self._travelling.remove(one)
