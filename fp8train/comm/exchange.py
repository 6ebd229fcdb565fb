"""FP8 reduction by exchange: FP8 on the wire, FP32 in the sum.

A ring that adds in FP8 rounds at every hop, so its error grows with the number of ranks, and it needs one
scale that all ranks share. Here nobody adds in FP8. For a block matrix
(:mod:`fp8train.numerics.block_scales`) on N ranks:

1. every rank quantises its own values, each block with its own scale;
2. all-to-all: rank r receives part r of every rank, codes and E8M0 scales;
3. rank r decodes and adds the N parts in FP32, in rank order: one rounding per contribution, whatever N is.
   *Reduce-scatter ends here*, with FP32 sums;
4. it quantises the sums and an all-gather hands them to everyone.

Sent per element: 1 + 1/block bytes in each half, like a ring all-reduce of bytes: half of what BF16 sends.
Ranks add the same numbers in the same order, so the result has the same bits on all of them, and on any
arrival order.

With ranks on several nodes, :class:`HierarchicalExchange` reduces inside the node first and only then between
nodes, where it moves 1/L of the data over L parallel links, in FP8 or BF16.

Both work in two halves so that a caller can overlap them with computation: ``start`` posts the first
communication, ``advance`` does what the first enables and posts the next, ``finish`` waits for the last.
Ranks must call them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.kernels.exchange_sum import Quantized, pack, sum_and_pack, sum_parts, unpack_into
from fp8train.numerics.formats import dtype_of
from fp8train.precision.gradients import Between
from fp8train.precision.number_formats import Format


def padded_blocks(count: int, ranks: int) -> int:
    """Smallest number of blocks, ``count`` or more, that ``ranks`` ranks can share evenly."""
    return -(-count // ranks) * ranks


class Exchange:
    """One reduction over one group: :meth:`start`, then :meth:`advance` and :meth:`finish` (all-reduce) or
    :meth:`sums` (reduce-scatter)."""

    def __init__(self, group: CountedGroup, fmt: Format, *, purpose: str) -> None:
        """Args: ``group``: who reduces; ``fmt``: of the codes; ``purpose``: name in the byte counters."""
        self._group, self._format, self._purpose = group, fmt, purpose
        self._block = 0
        self._received: Tensor | None = None
        self._gathered: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def start(self, payload: Tensor, scales: Tensor, *, order: Tensor | None = None) -> None:
        """Start the all-to-all: every rank is sent its part, codes and scales in one message.

        Args:
            payload: FP8 [blocks, block].
            scales: E8M0 bytes uint8 [blocks].
            order: of the blocks in the message, a multiple of the group's size; see
                :func:`~fp8train.kernels.exchange_sum.pack`. None: as they are.
        """
        # [N, blocks / N · (block + 1)] bytes: row r goes to rank r, so (N-1)/N of them leave this one.
        self.send(pack(payload, scales, self._group.size, order=order), payload.shape[1])

    def send(self, message: Tensor, block: int) -> None:
        """Start the all-to-all of a packed message."""
        self._block, self._received = block, torch.empty_like(message)
        self._wait = self._group.all_to_all(self._received, message, purpose=self._purpose)

    def _parts(self) -> Tensor:
        """Part ``rank`` as each of the N ranks cast it: uint8 [N, blocks / N · (block + 1)]."""
        assert self._wait is not None
        assert self._received is not None
        self._wait()
        received = self._received
        self._received = self._wait = None
        return received

    def sums(self) -> Tensor:
        """Wait for the parts and add them: FP32 sums of this rank's part [blocks / N, block]."""
        return sum_parts(self._parts(), self._block, self._format)

    def packed_sums(self, parts: int) -> Tensor:
        """Wait for the parts, add them and quantise the sums, with scales from their own amaxes, as a message
        of ``parts`` parts."""
        return sum_and_pack(self._parts(), self._block, self._format, parts=parts)

    def advance(self) -> None:
        """Wait for the parts, add them, quantise the sums and send them to everyone."""
        self.gather(self.packed_sums(1)[0], self._block)

    def gather(self, message: Tensor, block: int) -> None:
        """Send this rank's part to everyone: packed, uint8 [blocks / N · (block + 1)]."""
        # As many bytes are sent to each of the N - 1 other ranks.
        self._block, self._gathered = block, message.new_empty(self._group.size, message.numel())
        self._wait = self._group.all_gather(self._gathered, message, purpose=self._purpose)

    def finish(self, into: Quantized | None = None) -> Quantized:
        """Wait for the all-gather and return the quantised sums of all parts: (payload [blocks, block],
        scales [blocks]); in memory ``into`` of that shape, if it is given."""
        assert self._wait is not None
        assert self._gathered is not None
        self._wait()
        gathered = self._gathered
        self._gathered = self._wait = None
        if into is None:
            blocks = gathered.numel() // (self._block + 1)
            codes = gathered.new_empty(blocks, self._block).view(dtype_of(self._format))
            into = codes, gathered.new_empty(blocks)
        unpack_into(gathered, into)
        return into


class HierarchicalExchange:
    """An exchange in two levels, inside nodes and then between them: all-reduce or reduce-scatter,
    bit-identical on all ranks like :class:`Exchange`.

    Inside the node FP8 always; between nodes ``between`` chooses FP8 (three roundings in all) or BF16 (the
    sums of a node travel with 8 bits of mantissa, two roundings to FP8).
    """

    def __init__(
        self,
        local: CountedGroup,
        cross: CountedGroup,
        fmt: Format,
        *,
        between: Between,
        purpose: str,
    ) -> None:
        """Args: ``local``: ranks of this node; ``cross``: ranks of all nodes with this one's local rank."""
        self._cross, self._format, self._between, self._purpose = cross, fmt, between, purpose
        self._inside = Exchange(local, fmt, purpose=f"{purpose}_in_node")
        self._across = Exchange(cross, fmt, purpose=f"{purpose}_between_nodes")
        self._block = 0

    def start(self, payload: Tensor, scales: Tensor, *, order: Tensor | None = None) -> None:
        """Start the exchange inside the node. Arguments as for :meth:`Exchange.start`; ``blocks`` is a
        multiple of the node's ranks times the nodes."""
        self._block = payload.shape[1]
        self._inside.start(payload, scales, order=order)

    def sums(self) -> Tensor:
        """Add inside the node, then between nodes.

        Returns:
            FP32 sums of this rank's part [blocks / N, block]. Parts lie by place in the node first, then by
            node.
        """
        # With L ranks in each of M nodes: this rank has the node's sum of 1/L of the blocks, in FP32.
        # Between nodes each moves that 1/L: reduced to 1/(L·M).
        if self._between == "fp8":
            self._across.send(self._inside.packed_sums(self._cross.size), self._block)
            return self._across.sums()
        return sum_parts(self._parts_in_bf16(), self._block, self._format)

    def advance(self) -> None:
        """Add inside the node, then between nodes, and send the quantised sums to everyone."""
        if self._between == "fp8":
            self._across.send(self._inside.packed_sums(self._cross.size), self._block)
            self._across.advance()
        else:
            message = sum_and_pack(self._parts_in_bf16(), self._block, self._format)
            self._across.gather(message[0], self._block)
        # The 1/L of the final codes that this rank has, to its node.
        self._inside.gather(pack(*self._across.finish(), 1)[0], self._block)

    def _parts_in_bf16(self) -> Tensor:
        """This rank's part of the sums of all nodes, rounded to BF16 [M, elements], in node order."""
        nodes = self._cross.size
        # [nodes, bytes of a part]: 2 bytes an element, without scales.
        sent = self._inside.sums().to(torch.bfloat16).view(torch.uint8).reshape(nodes, -1)
        received = torch.empty_like(sent)
        self._cross.all_to_all(received, sent, purpose=f"{self._purpose}_between_nodes")()
        return received.view(torch.bfloat16)

    def finish(self, into: Quantized | None = None) -> Quantized:
        """Wait for the last all-gather and return the quantised sums of all parts: (payload [blocks, block],
        scales [blocks]); in memory ``into`` of that shape, if it is given."""
        return self._inside.finish(into)
