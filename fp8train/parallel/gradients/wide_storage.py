"""Gradients in high precision, one flat buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.parallel.gradients.held import HeldValues
from fp8train.parallel.gradients.receivers import Places


class WideStorage:
    """Micro-batches add up in ``dtype``; see :class:`~fp8train.parallel.gradients.bucket.Storage`."""

    accumulator_bytes = 0

    def __init__(self, places: Places, *, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate. Args: ``places``: in elements."""
        self.places = places
        self._flat = torch.zeros(places.total, dtype=dtype, device=device)
        self._views = [
            self._flat[place].view(member.shape)
            for member, place in zip(places.members, places.whole, strict=True)
        ]

    @property
    def stored_bytes(self) -> int:
        """The buffer."""
        return self._flat.nbytes

    def begin(self) -> None:
        """Nothing: the first contribution overwrites."""

    def buffer(self, member: int) -> Tensor:
        """The member's part, of its shape."""
        return self._views[member]

    def add(self, member: int, gradient: Tensor, *, first: bool) -> None:
        """Add up in the buffer."""
        view = self._views[member]
        if first:
            view.copy_(gradient)
        else:
            view.add_(gradient)

    def local(self, member: int) -> Tensor:
        """A view, in the accumulation dtype."""
        return self._views[member]

    def wide(self) -> Tensor:
        """This rank's sums, flat [total]."""
        return self._flat

    def hold(self, sums: Tensor) -> HeldValues:
        """Keep the sums over ranks, [total] in any dtype, in the buffer."""
        if sums is not self._flat:
            self._flat.copy_(sums)
        return HeldValues(self._views)

    def commit(self, clip: Tensor | None) -> None:
        """Nothing outlives the step."""
