"""What forward and backward of a step change, put back so that they can run again to the same bits.

Delayed scales and residuals move with an applied step alone, and running maxima are forgotten when a step
begins. What is left are the grids of exact sums, which a step may refit, and the generators of random
numbers, which nothing here draws from, but a module that somebody added may.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fp8train.checkpoint.rng import capture_rng, restore_rng


class StateBefore:
    """A copy of what a step may change before its update."""

    def __init__(self, scales: Mapping[str, Tensor], device: torch.device) -> None:
        """Copy ``scales``, the state of the reduction's scales, and the random states of this rank."""
        self._scales = [(tensor, tensor.clone()) for tensor in scales.values()]
        self._rng, self._device = capture_rng(device), device

    def restore(self) -> None:
        """Put everything back, in place."""
        for tensor, copy in self._scales:
            tensor.copy_(copy)
        restore_rng(self._rng, self._device)
