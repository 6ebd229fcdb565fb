"""What kernels of other packages are to us, and where they run.

Packages implement these interfaces in :mod:`fp8train.kernels.te` and :mod:`fp8train.kernels.apex`; who
chooses them is in :mod:`fp8train.kernels.attention`, :mod:`fp8train.kernels.norm_backend` and
:mod:`fp8train.kernels.multi_tensor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RunsOn = Callable[[torch.device], str | None]
"""Why such kernels do not run on a device, as the end of a sentence that begins with their name; None if they
do."""
CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of whole sequences: queries [B, heads, S, D], keys and values [B, groups, S, D] -> [B, heads, S, D]."""
NormFunction = Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
"""``(x [T, H] contiguous, weight [H] or None for 1, bias [H] or None for 0, eps) -> y [T, H]`` in x's dtype,
which is the weight's too; differentiable in all three tensors. An RMSNorm has no bias."""


def on_cuda(device: torch.device) -> str | None:
    """Transformer Engine's and apex's kernels: on CUDA devices. The meta device stands for one."""
    if device.type in ("cuda", "meta"):
        return None
    return f"is for CUDA devices, and this is a {device.type.upper()}"


@dataclass(frozen=True)
class AdamNumbers:
    """One AdamW step's numbers: ``lr`` with schedule and multipliers; a step removes ``lr * weight_decay`` of
    a weight."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    weight_decay: float


class MultiTensor(Protocol):
    """Such kernels on one device. Tensors are flat and contiguous.

    Attributes:
        name: of the AdamW, for people.
        most_elements: of a tensor.
    """

    name: str
    most_elements: int

    def adam(
        self,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        numbers: AdamNumbers,
        multiplier: Tensor,
    ) -> None:
        """One AdamW step in place, with gradients times ``multiplier``, a device scalar; those are
        overwritten. All FP32, none empty; waits for nothing."""

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of each tensor, FP32 or BF16: FP32 [tensors] on the device. Empty ones have norm 0;
        NaN or infinite where a number is not finite."""
        ...

    def widen(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """FP32 copies of BF16 tensors, none empty."""
        ...
