"""DeepSpeed's ZeRO-1 and 2 with gradients that travel in FP8. Imports DeepSpeed: only an engine imports this.

DeepSpeed copies gradients into a flat bucket, and when it is full averages it: each slice is added over the
ranks by an all-reduce of the whole bucket and kept where its partition is. Here that one step is ours
(:mod:`fp8train.comm.owned_slices`): slices of weights in the FP8 plan go to their owners as codes and scales
of blocks, the others by an all-reduce in DeepSpeed's communication type. What is before and after stays
DeepSpeed's: buckets, streams, the division by the ranks (before the cast, where a power of two changes no
code), and what becomes of the average. Where it is kept in FP32 it is not rounded again.

A gradient is cast once for each reduction: once a step with ZeRO-1, once a micro-batch with ZeRO-2. A block
begins where a parameter's part in a partition does, not with a row.

DeepSpeed makes its optimizer itself, so an engine adopts it: :meth:`Fp8ReducingZeroOptimizer.adopt` in
``_configure_zero_optimizer`` of an engine's subclass, or on ``engine.optimizer`` before the first backward.
The hooks that DeepSpeed made in its constructor look methods up when they run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Self

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.owned_slices import OwnedSlice, sum_to_owners
from fp8train.precision.number_formats import Format

_Entry = tuple[frozenset[int], Tensor, Tensor | None]
"""Of DeepSpeed: the ranks that keep a slice, the slice of the bucket, and where else its average is added."""


class Fp8ReducingZeroOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer of ZeRO-1 and 2, with an FP8 reduction. Made by :meth:`adopt`.

    Attributes:
        reduced: the ranks that reduce, with counters of what was sent.
    """

    reduced: CountedGroup
    _bucket: tuple[Tensor, list[int], list[bool]] | None
    """While it is averaged: the bucket, where its parameters end, and which are in the plan."""

    @classmethod
    def adopt(
        cls,
        optimizer: Any,
        in_plan: Collection[torch.nn.Parameter],
        *,
        fmt: Format,
        block: int,
        group: CountedGroup | None = None,
    ) -> Self:
        """Let an optimizer of DeepSpeed's reduce in FP8 from now on; returns the same object.

        Args:
            optimizer: of ZeRO-1 or 2, before its first backward.
            in_plan: parameters whose gradients travel in FP8.
            fmt: of the codes.
            block: elements that share a scale.
            group: who reduces, to count bytes with others; default: a counter of its own.

        Raises:
            ValueError: another optimizer, or one that reduces in a way which cannot be replaced.
        """
        if type(optimizer) is not DeepSpeedZeroOptimizer:
            raise ValueError(
                "gradients in FP8 need DeepSpeed's optimizer of ZeRO-1 or 2, not a "
                f"{type(optimizer).__name__}; write parallel.zero: 1 or 2, or gradients in high precision"
            )
        needed = {
            "zero_optimization.contiguous_gradients": optimizer.contiguous_gradients,
            "zero_optimization.reduce_scatter": optimizer.reduce_scatter,
            "zero_optimization.use_multi_rank_bucket_allreduce": optimizer.use_multi_rank_bucket_allreduce,
        }
        off = [key for key, value in needed.items() if not value]
        if off or optimizer.has_moe_layers:
            raise ValueError(
                f"gradients in FP8 need {', '.join(off) or 'a model without experts'}"
                + (": true in DeepSpeed's settings" if off else "")
            )
        optimizer.__class__ = cls
        optimizer.reduced = CountedGroup(optimizer.dp_process_group) if group is None else group
        optimizer._planned = {id(parameter) for parameter in in_plan}
        optimizer._format, optimizer._block = fmt, block
        optimizer._bucket = None
        made: Self = optimizer
        return made

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Average a bucket; what is in it is noted for :meth:`allreduce_and_scatter`, which DeepSpeed calls
        with slices that may span parameters."""
        ends, planned, end = [], [], 0
        for group, index, _ in self.ipg_buckets[communication_data_type].params:
            parameter = self.bit16_groups[group][index]
            end += parameter.numel()
            ends.append(end)
            planned.append(id(parameter) in self._planned)
        self._bucket = tensor, ends, planned
        try:
            super().average_tensor(tensor, communication_data_type)
        finally:
            self._bucket = None

    def allreduce_and_scatter(
        self, bucket: list[_Entry], communication_data_type: torch.dtype, **unused: Any
    ) -> None:
        """Add slices of the bucket up where their partitions are; their values are divided by the ranks."""
        assert self._bucket is not None
        tensor, ends, planned = self._bucket
        slices, places = [], []
        for ranks, part, output in bucket:
            (owner,) = ranks
            first = (part.data_ptr() - tensor.data_ptr()) // tensor.element_size()
            for start, stop, in_plan in _cut(first, first + part.numel(), ends, planned):
                slices.append(OwnedSlice(start, stop, owner, in_plan))
                places.append((part[start - first : stop - first], output, start - first))
        found = sum_to_owners(
            tensor,
            slices,
            self.reduced,
            fmt=self._format,
            block=self._block,
            wide=communication_data_type,
        )
        for average, (part, output, start) in zip(found, places, strict=True):
            if average is not None:
                if output is not None:  # in FP32, without the bucket's rounding
                    output.view(-1)[start : start + len(average)].add_(average.to(output.dtype))
                part.copy_(average)
                if self.overlap_comm and part.is_cuda:
                    part.record_stream(self.reduction_stream)


def _cut(start: int, stop: int, ends: list[int], planned: list[bool]) -> list[tuple[int, int, bool]]:
    """Elements ``start .. stop`` of a bucket cut where its parameters end: (start, stop, in plan)."""
    pieces, begin = [], 0
    for end, in_plan in zip(ends, planned, strict=True):
        low, high = max(start, begin), min(stop, end)
        if low < high:
            pieces.append((low, high, in_plan))
        begin = end
    return pieces
