"""RMSNorm and LayerNorm in float64, as the fakes of packages compute them: forward, and backward from the
statistics that forward left. Rows are those of x [T, H]."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, H], mean [T], 1 / root of the mean square of what is left [T])."""
    wide = x.double()
    mean = wide.mean(1) if centred else torch.zeros_like(wide[:, 0])
    inverse = ((wide - mean[:, None]).square().mean(1) + eps).rsqrt()
    y = (wide - mean[:, None]) * inverse[:, None]
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double(), mean, inverse


def backward(
    grad: Tensor, x: Tensor, mean: Tensor | None, inverse: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x [T, H], of weight [H], of bias [H]); ``mean``: None of an RMSNorm."""
    r, g = inverse.double()[:, None], grad.double()
    n = (x.double() - (0.0 if mean is None else mean.double()[:, None])) * r
    inner = g if weight is None else g * weight.double()
    along = inner - n * (inner * n).mean(1, keepdim=True)
    if mean is not None:
        along = along - inner.mean(1, keepdim=True)
    return along * r, (g * n).sum(0), g.sum(0)
