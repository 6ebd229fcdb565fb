"""Largest magnitudes of logical tensors, agreed on by the ranks that keep parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


class Agreement:
    """Turns the amaxes of this rank's parts into those of the logical tensors, all in one vector.

    Attributes:
        fqns: all parameters, in an order that the ranks share.
    """

    def __init__(
        self,
        fqns: Iterable[str],
        reduce_max: Callable[[Tensor], None] | None,
        device: torch.device | None,
    ) -> None:
        """Args: ``fqns``: see the class; ``reduce_max``: replaces an FP32
        vector by its elementwise maximum over the ranks, in place; None where this one keeps all; ``device``:
        of the vector."""
        self.fqns = tuple(fqns)
        self._position = {fqn: position for position, fqn in enumerate(self.fqns)}
        self._reduce_max, self._device = reduce_max, device

    def agreed(self, amaxes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The amaxes of the logical tensors, by FQN, from those of this rank's parts; collective over the
        ranks that hold other parts."""
        if self._reduce_max is None:
            return amaxes
        vector = torch.zeros(len(self._position), device=self._device)
        for fqn, amax in amaxes.items():
            vector[self._position[fqn]] = amax
        self._reduce_max(vector)
        return {fqn: vector[position] for fqn, position in self._position.items()}
