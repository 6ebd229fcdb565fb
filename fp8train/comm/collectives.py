"""Collectives that count what they put on the wire.

Bytes are per rank and direction. An all-reduce of n bytes over N ranks sends ``2·n·(N-1)/N`` (the ring
algorithms that NCCL and gloo use for large messages), an all-to-all and an all-gather that end in n bytes
send ``n·(N-1)/N``: a rank keeps its own part. What is entered and left is counted too
(:mod:`fp8train.comm.calls`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from fp8train.comm.calls import Calls, GroupCalls


class CountedGroup:
    """A process group with byte counters; with one rank every collective is the identity.

    Attributes:
        group: the torch group, or None for a single process.
        size: ranks in it.
        rank: this process's rank in it.
        sent: bytes sent since the start, by collective and purpose.
        calls: collectives entered and left.
        hops: the same of messages to one rank that come with one from another.
    """

    calls: GroupCalls
    hops: GroupCalls

    def __init__(
        self, group: dist.ProcessGroup | None, *, name: str = "group", calls: Calls | None = None
    ) -> None:
        """Count the calls of ``group`` among ``calls``, under its ``name``."""
        self.group = group
        counted = Calls() if calls is None else calls
        self._ranks = () if group is None else tuple(dist.get_process_group_ranks(group))
        self.calls, self.hops = (counted.group(kind, self._ranks) for kind in (name, f"{name} hop"))
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent: Counter[str] = Counter()

    def all_reduce(
        self, tensor: Tensor, *, purpose: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Callable[[], None]:
        """Start an in-place all-reduce and count its ``2·n·(N-1)/N`` bytes.

        Args:
            tensor: contiguous; must not be touched until the wait returns.
            purpose: name in the byte counters, e.g. ``gradient``.
            op: reduction.

        Returns:
            A function that waits for the result.
        """
        if self.group is None or self.size == 1:
            return lambda: None
        self.sent[what := f"all_reduce/{purpose}"] += 2 * tensor.nbytes * (self.size - 1) // self.size
        return self.calls.begun(what, dist.all_reduce(tensor, op=op, group=self.group, async_op=True).wait)

    def all_to_all(self, output: Tensor, tensor: Tensor, *, purpose: str) -> Callable[[], None]:
        """Start an all-to-all: row r of ``tensor`` goes to rank r, row r of ``output`` comes from it.

        Args:
            output: uint8 [N, n], contiguous; holds the result once the wait returned.
            tensor: uint8 [N, n], contiguous; must not be touched before.
            purpose: name in the byte counters.

        Returns:
            A function that waits for the result.
        """
        if self.group is None or self.size == 1:
            output.copy_(tensor)
            return lambda: None
        self.sent[what := f"all_to_all/{purpose}"] += tensor.nbytes * (self.size - 1) // self.size
        work = dist.all_to_all_single(output, tensor, group=self.group, async_op=True)
        return self.calls.begun(what, work.wait)

    def all_to_all_parts(
        self,
        output: Tensor,
        tensor: Tensor,
        *,
        received: Sequence[int],
        sent: Sequence[int],
        purpose: str,
    ) -> Callable[[], None]:
        """:meth:`all_to_all` of parts of different sizes.

        Args:
            output: uint8 [sum of ``received``], contiguous; the parts of ranks one after the other.
            tensor: uint8 [sum of ``sent``], contiguous; must not be touched before the wait returned.
            received: elements that come from each rank.
            sent: elements that go to each rank.
            purpose: name in the byte counters.

        Returns:
            A function that waits for the result.
        """
        if self.group is None or self.size == 1:
            output.copy_(tensor)
            return lambda: None
        others = sum(sent) - sent[self.rank]
        self.sent[what := f"all_to_all/{purpose}"] += others * tensor.element_size()
        parts = list(received), list(sent)
        work = dist.all_to_all_single(output, tensor, *parts, group=self.group, async_op=True)
        return self.calls.begun(what, work.wait)

    def all_gather(self, output: Tensor, tensor: Tensor, *, purpose: str) -> Callable[[], None]:
        """Start an all-gather: every rank gets all ranks' ``tensor``, in rank order.

        Args:
            output: [N, ..], contiguous; holds the result once the wait returned.
            tensor: [..] of a row of ``output``, contiguous; must not be touched before.
            purpose: name in the byte counters.

        Returns:
            A function that waits for the result.
        """
        if self.group is None or self.size == 1:
            output.copy_(tensor[None])
            return lambda: None
        self.sent[what := f"all_gather/{purpose}"] += tensor.nbytes * (self.size - 1)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        work = gather(output.view(-1), tensor.view(-1), group=self.group, async_op=True)
        return self.calls.begun(what, work.wait)

    def reduce_scatter(self, output: Tensor, tensor: Tensor, *, purpose: str) -> Callable[[], None]:
        """Start a reduce-scatter: row r of the sum over ranks goes to rank r.

        Args:
            output: [..] of a row of ``tensor``, contiguous; holds the result once the wait returned.
            tensor: [N, ..], contiguous; must not be touched before.
            purpose: name in the byte counters.

        Returns:
            A function that waits for the result.
        """
        if self.group is None or self.size == 1:
            output.copy_(tensor[0])
            return lambda: None
        self.sent[what := f"reduce_scatter/{purpose}"] += tensor.nbytes * (self.size - 1) // self.size
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = scatter(output.view(-1), tensor.view(-1), group=self.group, async_op=True)
        return self.calls.begun(what, work.wait)

    def send(self, tensor: Tensor, to: int, *, purpose: str) -> Callable[[], None]:
        """Start sending to one rank of the group; the other side calls :meth:`receive`.

        Args:
            tensor: contiguous; must not be touched until the wait returns.
            to: rank in the group.
            purpose: name in the byte counters.

        Returns:
            A function that waits until it is sent.
        """
        self.count("send", purpose, tensor.nbytes)
        work = dist.isend(tensor, group=self.group, group_dst=to)
        assert work is not None
        wait: Callable[[], object] = work.wait

        def sent() -> None:
            wait()

        return sent

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous tensor with what one rank of the group sends."""
        dist.recv(tensor, group=self.group, group_src=source)

    def swap(self, output: Tensor, tensor: Tensor, peer: int, *, purpose: str) -> None:
        """Send ``tensor`` to one rank of the group and fill ``output`` with what it sends; both call it."""
        self.count("send", purpose, tensor.nbytes)
        self.pass_on(tensor, peer, output, peer)

    def pass_on(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> None:
        """Send a tensor to one rank of the group while another is filled by what ``source`` sends; both
        contiguous, nothing is counted."""
        ops = [
            dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=to),
            dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=source),
        ]
        peers = self._ranks[to], self._ranks[source]
        with self.hops.held("send and receive", peers=peers):
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    def count(self, kind: str, purpose: str, nbytes: int) -> None:
        """Take bytes that others sent over this group into the counters."""
        self.sent[f"{kind}/{purpose}"] += nbytes

    def barrier(self) -> None:
        """Wait until every rank of the group has called this."""
        if self.group is not None and self.size > 1:
            with self.calls.held("barrier"):
                dist.barrier(self.group)


def alone() -> CountedGroup:
    """A group of this process alone: its collectives copy, and send nothing."""
    return CountedGroup(None)
