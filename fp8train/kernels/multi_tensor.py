"""The choice of kernels that treat many tensors in a few launches.

``auto`` has none: our own step (:mod:`fp8train.optim.fused_pass`) and torch's norms. ``apex`` is NVIDIA apex
(:mod:`fp8train.kernels.apex.multi_tensor`).
"""

from __future__ import annotations

from typing import Literal

import torch

from fp8train.kernels.package_kernels import MultiTensor, RunsOn, on_cuda


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
        raise ValueError(f"`{key}`: {wanted} {refusal}; write `{key}`=auto")
    if device.type == "meta":
        return None
    from fp8train.kernels.apex.multi_tensor import ApexMultiTensor

    return ApexMultiTensor(device)
