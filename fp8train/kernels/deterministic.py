"""Kernels whose result depends on nothing but their input."""

from __future__ import annotations

import os

import torch


def use_deterministic_kernels() -> None:
    """Have torch refuse kernels whose result depends on timing, in this process from now on.

    cuBLAS needs a workspace of fixed size for that, or torch refuses every matrix product on CUDA. The
    environment says which, and is read at the first of them; a value that is there already stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Fresh memory would be filled with NaN, a launch for each tensor; what is read here was written here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
