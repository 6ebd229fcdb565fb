"""Gradient clipping by the global norm: the factor stays a scalar on the device, so that nothing waits for
the host."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_multiplier(norm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / norm)``: the factor that brings gradients of this norm to at most ``max_norm``; 1
    for ``max_norm`` 0.

    Args:
        norm: scalar >= 0; NaN gives NaN.
        max_norm: threshold; 0 never clips.

    Returns:
        Scalar of norm's dtype and device.
    """
    if max_norm == 0:
        return torch.ones_like(norm)
    return (max_norm / norm).clamp(max=1.0)
