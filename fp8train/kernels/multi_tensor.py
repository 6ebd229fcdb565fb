"""Kernels of other packages that treat many tensors in a few launches: what they are to us, and the choice.

``auto`` has none: our own step (:mod:`fp8train.optim.fused_pass`) and torch's norms. ``apex`` is NVIDIA apex
(:mod:`fp8train.kernels.apex.multi_tensor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fp8train.kernels.runs_on import RunsOn, on_cuda


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


def choose_multi_tensor(
    device: torch.device, *, key: Literal["optimizer", "multi_tensor"], wanted: str, runs_on: RunsOn = on_cuda
) -> MultiTensor | None:
    """The kernels that are wanted, of their package, which is imported; None for ``auto``, and on the meta
    device, where nothing runs.

    Args:
        device: of the tensors.
        key: the setting that asks.
        wanted: ``auto`` or ``apex``.
        runs_on: where the kernels of packages run.

    Raises:
        ValueError: not on this device.
        RuntimeError: the package is not here, does not load, or is too old.
    """
    if wanted == "auto":
        return None
    if (refusal := runs_on(device)) is not None:
        raise ValueError(f"kernels.{key}: {wanted} {refusal}; write kernels.{key}: auto")
    if device.type == "meta":
        return None
    from fp8train.kernels.apex.multi_tensor import ApexMultiTensor

    return ApexMultiTensor(device)
