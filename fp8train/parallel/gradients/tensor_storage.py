"""Storage of gradients that will be cast to FP8 with one scale per tensor.

Micro-batches add up in BF16 or FP32, or, for fidelity to MS-AMP, in FP8 with a new scale at every addition
(which loses small contributions when there are many micro-batches). The cast itself needs all ranks' amax, so
:mod:`fp8train.parallel.gradients.shared_scale_sum` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate as accumulate_sizes

import torch
from torch import Tensor

from fp8train.numerics.cast import quantize, uncast
from fp8train.numerics.formats import dtype_of
from fp8train.parallel.gradients.bucket import Storage
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import Member, Places
from fp8train.precision.number_formats import Format
from fp8train.precision.operand_cast import QuantSpec
from fp8train.update_rules.rule import ALIGNMENT


@dataclass
class _Accumulator:
    """One tensor's sum over micro-batches; ``scale_inv`` is None in high precision."""

    payload: Tensor
    scale_inv: Tensor | None

    def add(self, gradient: Tensor, spec: QuantSpec, *, first: bool) -> None:
        if self.scale_inv is None:
            self.payload.copy_(gradient) if first else self.payload.add_(gradient)
            return
        total = gradient if first else gradient.float() + uncast(self.payload, self.scale_inv)
        payload, scale_inv = quantize(total, spec)
        self.payload.view(torch.uint8).copy_(payload.view(torch.uint8))
        self.scale_inv.copy_(scale_inv)

    def values(self) -> Tensor:
        return self.payload if self.scale_inv is None else uncast(self.payload, self.scale_inv)


def aligned_elements(member: Member) -> int:
    """Elements of a member's part of the sums, which begins at a multiple of what vector units read."""
    return -(-member.numel // ALIGNMENT) * ALIGNMENT


class TensorStorage(Storage):
    """Adds up each tensor of a bucket by itself, in high precision or FP8."""

    def __init__(self, places: Places, *, fmt: Format, accumulate: torch.dtype, memory: Memory) -> None:
        """Allocate sums of zero. Args: ``places``: counted in elements; ``accumulate``: BF16, FP32, or
        ``fmt.dtype``."""
        self.places, self.format, self._spec = places, fmt, QuantSpec(fmt)
        in_fp8 = accumulate == dtype_of(fmt)
        starts = list(accumulate_sizes(map(aligned_elements, places.members), initial=0))
        flat = memory.zeros("sums", (starts[-1],), torch.uint8 if in_fp8 else accumulate)
        self._flat = flat
        flat = flat.view(dtype_of(fmt)) if in_fp8 else flat
        self._accumulators = [
            _Accumulator(
                flat[start : start + m.numel].view(m.shape),
                torch.ones((), device=memory.device) if in_fp8 else None,
            )
            for start, m in zip(starts, places.members, strict=False)
        ]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the reduced codes and of a scale per tensor."""
        return self.scale_bytes + sum(place.stop - place.start for place in self.places.held)

    @property
    def scale_bytes(self) -> int:
        """An FP32 number for each tensor."""
        return 4 * len(self.places.held)

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of the sums of all tensors."""
        return sum(accumulator.payload.nbytes for accumulator in self._accumulators)

    def buffer(self, member: int) -> Tensor:
        """The member's sum, of its shape; uint8 codes if it adds up in FP8."""
        payload = self._accumulators[member].payload
        return payload.view(torch.uint8) if payload.element_size() == 1 else payload

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Add a micro-batch's gradient to the member's sum; in FP8 that is a decode, an addition and a
        cast."""
        self._accumulators[member].add(gradient, self._spec, first=first)

    def own_sum(self) -> Tensor:
        """Sum all elements in FP32; of FP8 sums the codes and the scales, which are NaN where a sum is not
        finite."""
        scales = [one.scale_inv for one in self._accumulators if one.scale_inv is not None]
        total = self._flat.sum(dtype=torch.float32)
        return total + torch.stack(scales).sum() if scales else total

    def tensors(self) -> list[Tensor]:
        """This rank's sums of all members in high precision, each of its member's shape."""
        return [accumulator.values() for accumulator in self._accumulators]
