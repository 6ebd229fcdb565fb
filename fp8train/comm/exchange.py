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
from fp8train.numerics.block_scales import dequantize_blocks, quantize_blocks
from fp8train.numerics.formats import dtype_of
from fp8train.precision.gradients import Between
from fp8train.precision.number_formats import Format

Quantized = tuple[Tensor, Tensor]
"""(payload FP8 [blocks, block], E8M0 scales uint8 [blocks])."""


def padded_blocks(count: int, ranks: int) -> int:
    """Smallest number of blocks, ``count`` or more, that ``ranks`` ranks can share evenly."""
    return -(-count // ranks) * ranks


def pack(payload: Tensor, scales: Tensor, parts: int) -> Tensor:
    """Put codes and scales of each part side by side, so that one message carries both.

    Args:
        payload: FP8 [blocks, block], ``blocks`` a multiple of ``parts``.
        scales: uint8 [blocks].
        parts: receivers.

    Returns:
        uint8 [parts, blocks / parts · (block + 1)].
    """
    codes = payload.view(torch.uint8).reshape(parts, -1)
    return torch.cat((codes, scales.view(parts, -1)), dim=1)


def unpack(message: Tensor, block: int, dtype: torch.dtype) -> Quantized:
    """Take one part's message apart: uint8 [blocks · (block + 1)] -> (payload [blocks, block], scales
    [blocks]), views of it."""
    blocks = message.numel() // (block + 1)
    codes = message[: blocks * block].view(blocks, block)
    return codes.view(dtype), message[blocks * block :]


def sum_parts(messages: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """FP32 sum of the parts received, in rank order: uint8 [N, blocks · (block + 1)] -> [blocks, block]."""
    total = dequantize_blocks(*unpack(messages[0], block, dtype))
    for message in messages[1:]:
        total += dequantize_blocks(*unpack(message, block, dtype))
    return total


class Exchange:
    """One reduction over one group: :meth:`start`, :meth:`advance`, then :meth:`finish` (all-reduce) or
    nothing more (reduce-scatter: :meth:`advance` returned the FP32 sums)."""

    def __init__(self, group: CountedGroup, fmt: Format, *, purpose: str) -> None:
        """Args: ``group``: who reduces; ``fmt``: of the codes; ``purpose``: name in the byte counters."""
        self._group, self._format, self._purpose = group, fmt, purpose
        self._block = 0
        self._received: Tensor | None = None
        self._gathered: Tensor | None = None
        self._wait: Callable[[], None] | None = None

    def start(self, payload: Tensor, scales: Tensor) -> None:
        """Start the all-to-all: every rank is sent its part, codes and scales in one message.

        Args:
            payload: FP8 [blocks, block]; ``blocks`` a multiple of the group's size.
            scales: E8M0 bytes uint8 [blocks].
        """
        # [N, blocks / N · (block + 1)] bytes: row r goes to rank r, so (N-1)/N of them leave this one.
        message = pack(payload, scales, self._group.size)
        self._block = payload.shape[1]
        self._received = torch.empty_like(message)
        self._wait = self._group.all_to_all(self._received, message, purpose=self._purpose)

    def advance(self, *, gather: bool = True) -> Tensor:
        """Wait for the parts and add them; with ``gather``, quantise the sums and send them to everyone.

        Returns:
            FP32 sums of this rank's part [blocks / N, block].
        """
        assert self._wait is not None
        assert self._received is not None
        self._wait()
        # Part ``rank`` as each of the N ranks cast it, decoded and added in FP32, in rank order.
        total = sum_parts(self._received, self._block, dtype_of(self._format))
        self._received = self._wait = None
        if gather:  # cast again, with scales from the amaxes of the sums
            self.gather(*quantize_blocks(total, self._format))
        return total

    def gather(self, payload: Tensor, scales: Tensor) -> None:
        """Send this rank's quantised part to everyone: FP8 [blocks / N, block], uint8 [blocks / N]."""
        # blocks / N · (block + 1) bytes, sent to each of the N - 1 other ranks.
        message = pack(payload, scales, 1)[0]
        self._block = payload.shape[1]
        self._gathered = message.new_empty(self._group.size, message.numel())
        self._wait = self._group.all_gather(self._gathered, message, purpose=self._purpose)

    def finish(self) -> Quantized:
        """Wait for the all-gather and return the quantised sums of all parts: (payload [blocks, block],
        scales [blocks])."""
        assert self._wait is not None
        assert self._gathered is not None
        self._wait()
        parts = [unpack(message, self._block, dtype_of(self._format)) for message in self._gathered]
        self._gathered = self._wait = None
        payload = torch.cat([part.view(torch.uint8) for part, _ in parts]).view(dtype_of(self._format))
        return payload, torch.cat([scales for _, scales in parts])


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

    def start(self, payload: Tensor, scales: Tensor) -> None:
        """Start the exchange inside the node. Arguments as for :meth:`Exchange.start`; ``blocks`` is a
        multiple of the node's ranks times the nodes."""
        self._inside.start(payload, scales)

    def advance(self, *, gather: bool = True) -> Tensor:
        """Add inside the node, then between nodes; with ``gather``, send the quantised sums to everyone.

        Returns:
            FP32 sums of this rank's part [blocks / N, block]. Parts lie by place in the node first, then by
            node.
        """
        # With L ranks in each of M nodes: this rank has the node's sum of 1/L of the blocks, in FP32.
        total = self._inside.advance(gather=False)
        # Between nodes each moves that 1/L: reduced to 1/(L·M), and with ``gather`` collected again as codes.
        if self._between == "fp8":
            self._across.start(*quantize_blocks(total, self._format))
            total = self._across.advance(gather=gather)
        else:
            total = self._add_in_bf16(total)
            if gather:
                self._across.gather(*quantize_blocks(total, self._format))
        if gather:  # the 1/L of the final codes that this rank has, to its node
            self._inside.gather(*self._across.finish())
        return total

    def _add_in_bf16(self, total: Tensor) -> Tensor:
        """This rank's part of the sum over nodes, FP32 from BF16 contributions in node order."""
        nodes = self._cross.size
        # [nodes, bytes of a part]: 2 bytes an element, without scales.
        sent = total.to(torch.bfloat16).view(torch.uint8).reshape(nodes, -1)
        received = torch.empty_like(sent)
        self._cross.all_to_all(received, sent, purpose=f"{self._purpose}_between_nodes")()
        parts = received.view(torch.bfloat16).view(nodes, -1, total.shape[1])
        result = parts[0].float()
        for part in parts[1:]:
            result += part.float()
        return result

    def finish(self) -> Quantized:
        """Wait for the last all-gather and return the quantised sums of all parts: (payload [blocks, block],
        scales [blocks])."""
        return self._inside.finish()
