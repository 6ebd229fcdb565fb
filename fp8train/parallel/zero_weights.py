"""New weights from their ZeRO owners to everyone.

After the optimizer step each rank has the new values of the rows that it owns. They travel in groups of
consecutive parameters, in the order in which forward needs them: FP8-resident weights as the codes that the
GEMM reads (1 byte; their scales were agreed on, so nobody sends them), all others in the compute type. A
layer's weights are waited for where they are used (:meth:`WeightGather.wait`), so that the gather overlaps
with the forward pass before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.parallel.zero import Partition


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


@dataclass
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

    def _rows(self, matrix: Matrix, rank: int) -> tuple[int, int, int]:
        """(first row, row after the last, elements) that ``rank`` owns."""
        rows = self._plan.owners[matrix.fqn][rank]
        row = matrix.values[0].numel() if len(matrix.values) else 0
        return rows.start, rows.stop, len(rows) * row

    @torch.no_grad()
    def start(self) -> None:
        """Start the all-gathers: every rank sends the new rows that it owns, and calls this at the same
        point."""
        for one in self._groups:
            pieces = [matrix.read(*self._rows(matrix, self._group.rank)[:2]) for matrix in one.matrices]
            own = torch.cat(pieces)
            message = own.new_zeros(one.part)
            message[: len(own)] = own
            one.arrived = message.new_empty(self._group.size, one.part)
            one.wait = self._group.all_gather(one.arrived, message, purpose=one.purpose)

    def wait(self, fqn: str) -> None:
        """Wait until all rows of this weight are here, and store them."""
        for number in self._of[fqn]:
            self._finish(self._groups[number])

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
