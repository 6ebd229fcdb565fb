"""Sums over ranks of the slices of a flat bucket, each where its owner is: FP8 on the wire, FP32 in the sum.

Who partitions by elements (DeepSpeed's ZeRO-1 and 2) owns ranges of a bucket, not equal parts of it: a bucket
of neighbouring parameters may belong to one rank altogether. So parts are sent as they are owned, in an
all-to-all of uneven parts; padded to equal ones, most of what travels would be padding.

For the slices of the FP8 plan, as in :mod:`fp8train.comm.exchange`: every rank quantises its own values, a
scale for each block from the slice's start on; owners decode what the ranks sent and add it in FP32, in rank
order. Nothing is rounded after that. A rank sends 1 + 1/block bytes for each element that others own. All
other slices are summed by an all-reduce in high precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.kernels.block_cast import cast_blocks
from fp8train.kernels.exchange_sum import pack, sum_parts
from fp8train.numerics.block_scales import as_blocks
from fp8train.precision.number_formats import Format


@dataclass(frozen=True)
class OwnedSlice:
    """Elements ``start .. stop`` of a bucket: which rank of the group wants their sum, and whether they are
    of the FP8 plan."""

    start: int
    stop: int
    owner: int
    in_plan: bool


def sum_to_owners(
    bucket: Tensor,
    slices: Sequence[OwnedSlice],
    group: CountedGroup,
    *,
    fmt: Format,
    block: int,
    wide: torch.dtype,
    purpose: str = "gradient",
) -> list[Tensor | None]:
    """Add slices up over the ranks; all of them call this with equal slices of buckets of one size.

    Args:
        bucket: [n], any float dtype; it is not changed.
        slices: of it, in any order.
        group: who adds.
        fmt: of the codes that slices of the plan travel as.
        block: elements that share a scale.
        wide: type in which all other slices are added.
        purpose: name in the byte counters; ``_wide`` is appended for the other slices.

    Returns:
        For each slice its sum, FP32 [stop - start], if this rank owns it, else None. NaN where a block of any
        rank was not finite.
    """
    found: list[Tensor | None] = [None] * len(slices)
    planned = [i for i, one in enumerate(slices) if one.in_plan]
    if planned:
        _sum_codes(bucket, slices, planned, found, group, fmt, block, purpose)
    others = [i for i, one in enumerate(slices) if not one.in_plan]
    if others:
        values = torch.cat([bucket[slices[i].start : slices[i].stop].to(wide) for i in others])
        group.all_reduce(values, purpose=f"{purpose}_wide")()
        parts = values.split([slices[i].stop - slices[i].start for i in others])
        for i, part in zip(others, parts, strict=True):
            if slices[i].owner == group.rank:
                found[i] = part.float()
    return found


def _sum_codes(
    bucket: Tensor,
    slices: Sequence[OwnedSlice],
    planned: Sequence[int],
    found: list[Tensor | None],
    group: CountedGroup,
    fmt: Format,
    block: int,
    purpose: str,
) -> None:
    """Fill ``found`` with the sums of this rank's slices of the plan."""
    owned = [[i for i in planned if slices[i].owner == rank] for rank in range(group.size)]
    messages = [_message(bucket, [slices[i] for i in own], fmt, block) for own in owned]
    sent = [message.numel() for message in messages]
    mine = sent[group.rank]
    received = messages[0].new_empty(group.size * mine)
    group.all_to_all_parts(
        received, torch.cat(messages), received=[mine] * group.size, sent=sent, purpose=purpose
    )()
    if not mine:
        return
    sums = sum_parts(received.view(group.size, mine), block, fmt)
    row = 0
    for i in owned[group.rank]:
        numel = slices[i].stop - slices[i].start
        rows = -(-numel // block)
        found[i] = sums[row : row + rows].view(-1)[:numel]
        row += rows


def _message(bucket: Tensor, slices: Sequence[OwnedSlice], fmt: Format, block: int) -> Tensor:
    """Codes and scales of these slices, packed: uint8 [blocks · (block + 1)]."""
    if not slices:
        return bucket.new_empty(0, dtype=torch.uint8)
    blocks = torch.cat([as_blocks(bucket[one.start : one.stop], block) for one in slices])
    return pack(*cast_blocks(blocks, block, fmt), 1)[0]
