"""Where the tensors of a bucket's storage lie: in memory of their own, or where other buckets lie at other
times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Memory:
    """Gives a storage new memory.

    Attributes:
        shared: whether other buckets write there between steps, and before this one's turn.
    """

    shared = False

    def __init__(self, device: torch.device) -> None:
        """``device``: where it lies."""
        self.device = device

    def full(self, name: str, shape: Sequence[int], value: int, dtype: torch.dtype) -> Tensor:
        """A tensor of ``value``; ``name`` tells the tensors of a storage apart."""
        return torch.full(tuple(shape), value, dtype=dtype, device=self.device)

    def zeros(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        return self.full(name, shape, 0, dtype)


class SharedMemory(Memory):
    """One place for several buckets of a kind, the largest of which asks first. The tensors of one name begin
    at one address, whatever their lengths."""

    shared = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._tensors: dict[str, Tensor] = {}

    def full(self, name: str, shape: Sequence[int], value: int, dtype: torch.dtype) -> Tensor:
        """The beginning of the place's tensor of this name; of ``value`` where it is new."""
        count = math.prod(shape)
        if name not in self._tensors:
            self._tensors[name] = super().full(name, (count,), value, dtype)
        whole = self._tensors[name]
        assert count <= len(whole) and whole.dtype == dtype, f"the largest bucket comes first: {name}"
        return whole[:count].view(*shape)
