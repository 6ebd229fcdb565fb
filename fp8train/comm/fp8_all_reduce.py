"""FP8 sums over a process group: the rings and trees of :mod:`fp8train.comm.fp8_sum`, and NCCL's own.

``ring`` and ``tree`` go hop by hop: a rank sends the bytes of its partial sum (gloo refuses float8), the
receiver adds its own and rounds to FP8. The bits are those of ``fold_ring`` and ``fold_tree``, the same on
all ranks and any backend. Both put ``(N - 1) · ceil(n / N)`` bytes per rank on the wire to reduce and as many
again to gather, the ring in N - 1 messages each, the tree in ceil(log2 N). ``native`` leaves the sum to NCCL.

Bytes are counted as this rank sends them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.fp8_sum import add_codes, as_chunks
from fp8train.numerics.formats import dtype_of, format_of
from fp8train.precision.gradients import Algorithm
from fp8train.precision.number_formats import Format

_NATIVE_NCCL = (2, 24, 3)  # the first release with FP8 reductions
_NATIVE_CAPABILITY = (9, 0)


def all_reduce(
    codes: Tensor, group: CountedGroup, algorithm: Algorithm, *, purpose: str
) -> Callable[[], Tensor]:
    """Start the sum that every rank gets.

    Args:
        codes: FP8 payload [n], contiguous; consumed: not to be touched until the wait returns, and with
            undefined contents afterwards.
        group: the ranks.
        algorithm: who adds; ``ring`` and ``tree`` are done when this returns.
        purpose: name in the byte counters, under ``all_reduce/``.

    Returns:
        A function that waits for the whole sum, FP8 [n]: the bits of ``fold_ring`` or ``fold_tree``.

    Raises:
        ValueError: ``native`` where :func:`check_native` refuses it.
    """
    if algorithm == "native":
        return _native_all_reduce(codes, group, purpose=purpose)
    reduce, gather = _HOPS[algorithm]
    fmt, key = format_of(codes.dtype), f"all_reduce/{purpose}"
    chunks = as_chunks(codes, group.size)
    reduce(chunks, fmt, group, key)
    gather(chunks, group, key)
    total = chunks.flatten()[: codes.numel()].view(dtype_of(fmt))
    return lambda: total


def reduce_scatter(
    codes: Tensor, group: CountedGroup, algorithm: Algorithm, *, purpose: str
) -> Callable[[], Tensor]:
    """Start the sum of which every rank gets its chunk, FP8 [ceil(n / N)]; the last chunks may end in
    padding. As :func:`all_reduce` otherwise, with the same bits; counted under ``reduce_scatter/``."""
    if algorithm == "native":
        return _native_reduce_scatter(codes, group, purpose=purpose)
    fmt = format_of(codes.dtype)
    chunks = as_chunks(codes, group.size)
    _HOPS[algorithm][0](chunks, fmt, group, f"reduce_scatter/{purpose}")
    mine = chunks[group.rank].clone().view(dtype_of(fmt))  # a view would keep all chunks alive
    return lambda: mine


def _reduce_ring(chunks: Tensor, fmt: Format, group: CountedGroup, key: str) -> None:
    """``chunks[rank]`` becomes the sum; the others are left as partial sums."""
    N, rank = group.size, group.rank
    received = torch.empty_like(chunks[0])
    for hop in range(1, N):
        _hop(group, (rank + 1) % N, chunks[(rank - hop) % N], (rank - 1) % N, received, key)
        mine = chunks[(rank - hop - 1) % N]
        mine.copy_(add_codes(received, mine, fmt))


def _gather_ring(chunks: Tensor, group: CountedGroup, key: str) -> None:
    N, rank = group.size, group.rank
    for hop in range(N - 1):
        outgoing, incoming = chunks[(rank - hop) % N], chunks[(rank - hop - 1) % N]
        _hop(group, (rank + 1) % N, outgoing, (rank - 1) % N, incoming, key)


def _reduce_tree(chunks: Tensor, fmt: Format, group: CountedGroup, key: str) -> None:
    """``chunks[rank]`` becomes the sum.

    In the tree of chunk c, rank r has position ``(r - c) mod N``. At the level with stride s the odd
    multiples of s send to the position s before them: for every chunk that is the same rank, ``r - s``, so
    one message carries them all.
    """
    for stride in _strides(group.size):
        children, parents = _tree_chunks(chunks, group, stride)
        received = chunks[parents]
        below, above = (group.rank - stride) % group.size, (group.rank + stride) % group.size
        _hop(group, below, chunks[children], above, received, key)
        chunks[parents] = add_codes(chunks[parents], received, fmt)


def _gather_tree(chunks: Tensor, group: CountedGroup, key: str) -> None:
    """The way of :func:`_reduce_tree` back: parents send what their children lack."""
    for stride in reversed(_strides(group.size)):
        children, parents = _tree_chunks(chunks, group, stride)
        received = chunks[children]
        below, above = (group.rank - stride) % group.size, (group.rank + stride) % group.size
        _hop(group, above, chunks[parents], below, received, key)
        chunks[children] = received


_HOPS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "ring": (_reduce_ring, _gather_ring),
    "tree": (_reduce_tree, _gather_tree),
}
"""How each algorithm sums chunks, and how it then brings them to everyone."""


def _strides(size: int) -> list[int]:
    return [1 << level for level in range((size - 1).bit_length())]


def _tree_chunks(chunks: Tensor, group: CountedGroup, stride: int) -> tuple[Tensor, Tensor]:
    """(chunks in whose trees this rank is a child at this level, those in which it is a parent of a
    child), int64. Both ends of a message list the positions in ascending order."""
    position = torch.arange(group.size, device=chunks.device)
    owner = (group.rank - position) % group.size
    return owner[stride :: 2 * stride], owner[: max(0, group.size - stride) : 2 * stride]


def _hop(group: CountedGroup, to: int, outgoing: Tensor, source: int, incoming: Tensor, key: str) -> None:
    """Send ``outgoing`` to one rank while ``incoming`` is filled by another; both contiguous uint8."""
    group.pass_on(outgoing, to, incoming, source)
    group.sent[key] += outgoing.nbytes


def check_native(device: torch.device) -> None:
    """Refuse NCCL's FP8 SUM where it does not exist.

    Raises:
        ValueError: not a CUDA device, compute capability below 9.0, or NCCL older than 2.24.3.
    """
    remedy = "use algorithm 'ring' or 'tree', which run everywhere"
    if device.type != "cuda":
        raise ValueError(f"algorithm 'native' is NCCL's FP8 sum and needs CUDA, not {device}; {remedy}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _NATIVE_CAPABILITY:
        raise ValueError(
            f"algorithm 'native': NCCL reduces FP8 from compute capability 9.0 on, {device} has "
            f"{capability[0]}.{capability[1]}; {remedy}"
        )
    version = torch.cuda.nccl.version()
    if version < _NATIVE_NCCL:
        raise ValueError(
            f"algorithm 'native': NCCL reduces FP8 since 2.24.3, this is "
            f"{'.'.join(map(str, version))}; {remedy}"
        )


def _native_all_reduce(codes: Tensor, group: CountedGroup, *, purpose: str) -> Callable[[], Tensor]:
    """NCCL's FP8 SUM, in place. **Unmeasured**: written from NCCL's release notes; no machine with two such
    GPUs was at hand. NCCL chooses ring, tree or NVLS by size and topology, so where it rounds, and hence the
    bits, are its own. Bytes are counted as for a ring."""
    check_native(codes.device)
    if group.group is None or group.size == 1:
        return lambda: codes
    work = dist.all_reduce(codes, group=group.group, async_op=True)
    group.sent[f"all_reduce/{purpose}"] += 2 * codes.nbytes * (group.size - 1) // group.size
    wait = group.calls.begun(f"all_reduce/{purpose}", work.wait)
    return lambda: (wait(), codes)[1]


def _native_reduce_scatter(codes: Tensor, group: CountedGroup, *, purpose: str) -> Callable[[], Tensor]:
    """The same for a reduce-scatter; **unmeasured** too."""
    check_native(codes.device)
    if group.group is None or group.size == 1:
        return lambda: codes
    chunks = as_chunks(codes, group.size).view(codes.dtype)
    mine = torch.empty_like(chunks[0])
    work = dist.reduce_scatter_tensor(mine, chunks.flatten(), group=group.group, async_op=True)
    group.sent[f"reduce_scatter/{purpose}"] += chunks[0].nbytes * (group.size - 1)
    wait = group.calls.begun(f"reduce_scatter/{purpose}", work.wait)
    return lambda: (wait(), mine)[1]
