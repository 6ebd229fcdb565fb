"""torch's storage types of the number formats (:mod:`fp8train.precision.number_formats`)."""

from __future__ import annotations

import torch

from fp8train.precision.number_formats import E4M3, E5M2, Format

_DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e2m1": torch.float4_e2m1fn_x2,
    "fp16": torch.float16,
}
_FP8 = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def dtype_of(fmt: Format) -> torch.dtype:
    """The type that codes of ``fmt`` are stored in."""
    return _DTYPES[fmt.name]


def format_of(dtype: torch.dtype) -> Format:
    """The format stored in ``dtype``; ``ValueError`` if it is not an FP8 type."""
    if dtype not in _FP8:
        raise ValueError(f"{dtype} is not an FP8 type; expected one of {', '.join(map(str, _FP8))}")
    return _FP8[dtype]
