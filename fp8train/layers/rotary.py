"""Rotary position embedding (Su et al. 2021), with Llama-3's frequency scaling.

Dimension pairs are (i, i + D/2), as in Llama's published weights. Position p rotates pair i by the angle
``p · theta^(-2i/D)``. Angles are computed in FP64 and kept as FP32 cosines and sines (FP64 in FP64 runs); the
rotation is done in that precision too, because a cosine rounded to BF16 shifts relative positions at long
context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling: long wavelengths are stretched by ``factor``, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angular frequency of each pair of dimensions, in radians per position: FP64 [head_dim / 2]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    ratio = scaling.original_max_seq_len / wavelength
    ramp = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = ramp.clamp(0, 1)  # 0: stretch fully, 1: keep
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotary_table(frequencies: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the first ``length`` positions, each [length, head_dim / 2] in ``dtype``."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies[None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)
