"""What forward, backward and reduction of a step gave, on the host: all that is needed to decide about it.

The host reads these numbers once, before the update. All of them but a rank's own are the same on all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """The numbers of one step.

    Attributes:
        total: loss summed over the global batch, FP64 device scalar.
        norm: of all reduced gradients, FP64 device scalar.
        own_total: this rank's part of ``total``.
        loss: mean over the target tokens, in nats.
        grad_norm: the norm.
        num_targets: target tokens of the global batch.
    """

    total: Tensor
    norm: Tensor
    own_total: Tensor
    loss: float
    grad_norm: float
    num_targets: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @classmethod
    def read(cls, total: Tensor, norm: Tensor, num_targets: Tensor | int, own_total: Tensor) -> Measured:
        """Bring them to the host; waits for the device, once."""
        count = num_targets if isinstance(num_targets, int) else num_targets.double()
        device = [norm.double(), total] if isinstance(count, int) else [norm.double(), total, count]
        values = torch.stack(device).tolist()
        targets = float(count) if isinstance(count, int) else values[2]
        loss = values[1] / max(targets, 1.0)
        return cls(total, norm, own_total, loss, values[0], targets)
