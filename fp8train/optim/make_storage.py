"""Allocates the storage that belongs to the description of a state's format."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.optim.scaled_formats import BlockStorage, ExpandedStorage, RootStorage, TensorStorage
from fp8train.optim.state_storage import StatePlace, Storage
from fp8train.optim.unscaled_formats import BFloat16Storage, RemainderStorage, WideStorage
from fp8train.precision.number_formats import FP16, format_by_name
from fp8train.precision.state_formats import StateFormat


def make_storage(fmt: StateFormat, place: StatePlace, *, wide: torch.dtype) -> Storage:
    """Allocate a state of this format, all zeros.

    Args:
        fmt: what to store it as.
        place: shape and place of the state.
        wide: what ``fp32`` stands for: FP64 for FP64 parameters, else FP32.
    """
    storage = _make(fmt, place, wide)
    return RootStorage(storage) if fmt.sqrt else storage


def make_master_storage(
    fmt: StateFormat, place: StatePlace, *, wide: torch.dtype, weight: Tensor | None
) -> Storage:
    """Allocate a master weight; one that the parameter holds itself is not stored twice.

    Args:
        fmt: what to store it as.
        place: shape and place of the state.
        wide: as in :func:`make_storage`.
        weight: the parameter's memory, or None where the model keeps no copy of it. An FP32 master of an FP32
            parameter is that parameter; the upper half of ``bf16_remainder`` is a BF16 parameter. All other
            masters start at zero.
    """
    if weight is not None:
        if fmt.format in ("fp32", "fp64") and weight.dtype == _wide_dtype(fmt, wide):
            return WideStorage(place, weight.dtype, weight)
        if fmt.format == "bf16_remainder" and weight.dtype == torch.bfloat16:
            return RemainderStorage(place, weight)
    return make_storage(fmt, place, wide=wide)


def _wide_dtype(fmt: StateFormat, wide: torch.dtype) -> torch.dtype:
    return torch.float64 if fmt.format == "fp64" else wide


def _make(fmt: StateFormat, place: StatePlace, wide: torch.dtype) -> Storage:
    if fmt.format in ("fp32", "fp64"):
        return WideStorage(place, _wide_dtype(fmt, wide))
    if fmt.format == "bf16":
        return BFloat16Storage(place)
    if fmt.format == "bf16_remainder":
        return RemainderStorage(place)
    codes = FP16 if fmt.format == "fp16_scaled" else format_by_name(fmt.format)
    if fmt.expand:
        return ExpandedStorage(place, codes)
    return BlockStorage(place, codes) if fmt.granularity == "block" else TensorStorage(place, codes)
