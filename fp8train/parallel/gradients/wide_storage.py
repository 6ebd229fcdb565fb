"""Gradients in high precision, in one flat buffer for all parameters of a bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.parallel.gradients.bucket import Storage
from fp8train.parallel.gradients.held import HeldValues
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import Places


class WideStorage(Storage):
    """Adds up micro-batches in ``dtype``."""

    def __init__(self, places: Places, *, dtype: torch.dtype, memory: Memory) -> None:
        """Allocate a buffer of zeros. Args: ``places``: counted in elements."""
        self.places = places
        self._flat = memory.zeros("sums", (places.total,), dtype)
        self._views = [
            self._flat[place].view(member.shape)
            for member, place in zip(places.members, places.whole, strict=True)
        ]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffer."""
        return self._flat.nbytes

    def buffer(self, member: int) -> Tensor:
        """The member's part of the buffer, a view of its shape."""
        return self._views[member]

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Add a micro-batch's gradient to the buffer; the ``first`` of the step overwrites."""
        view = self._views[member]
        if first:
            view.copy_(gradient)
        else:
            view.add_(gradient)

    def own_sum(self) -> Tensor:
        """Sum all elements, in FP32 or wider."""
        return self._flat.sum(dtype=torch.promote_types(self._flat.dtype, torch.float32))

    def wide(self) -> Tensor:
        """This rank's sums of all members, flat [total]."""
        return self._flat

    def hold(self, sums: Tensor) -> HeldValues:
        """Keep the sums over ranks, [total] in any dtype, in the buffer."""
        if sums is not self._flat:
            self._flat.copy_(sums)
        return HeldValues(self._views)
