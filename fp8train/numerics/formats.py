"""The two FP8 formats of the OCP specification, described by their definition.

An FP8 code is sign | exponent | mantissa. With bias ``b`` and ``m`` mantissa bits, a code with exponent field
``e > 0`` and mantissa field ``f`` stands for ``2^(e-b) · (1 + f/2^m)``; ``e = 0`` is subnormal: ``2^(1-b) ·
f/2^m``. E4M3 has no infinity and one NaN per sign (all ones); E5M2 reserves its top exponent for infinities
and NaNs as IEEE does. Both largest finite values are ``1.75 · 2^k``, which :mod:`fp8train.numerics.scale`
relies on.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); OCP OFP8 specification 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A floating-point format of few bits: E4M3, E5M2, or E2M1 for simulation.

    Attributes:
        name: ``e4m3`` or ``e5m2``.
        dtype: the torch storage type.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        bias: exponent bias.
        max: largest finite value.
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float

    @property
    def min_normal(self) -> float:
        """Smallest positive normal value."""
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value, a subnormal one."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value: ``floor(log2(max))``."""
        return torch.finfo(self.dtype).max.as_integer_ratio()[0].bit_length() - 1


E4M3 = Format("e4m3", torch.float8_e4m3fn, exponent_bits=4, mantissa_bits=3, bias=7, max=448.0)
E5M2 = Format("e5m2", torch.float8_e5m2, exponent_bits=5, mantissa_bits=2, bias=15, max=57344.0)
E2M1 = Format("e2m1", torch.float4_e2m1fn_x2, exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
"""FP4 (OCP MX 1.0), for simulation only (:mod:`fp8train.numerics.nvfp4`): nothing is stored in its dtype."""

_BY_NAME = {"e4m3": E4M3, "e5m2": E5M2, "e2m1": E2M1}
_BY_DTYPE = {E4M3.dtype: E4M3, E5M2.dtype: E5M2}


def format_by_name(name: str) -> Format:
    """The format called ``name``; ``ValueError`` names the legal ones."""
    if name not in _BY_NAME:
        raise ValueError(f"unknown FP8 format {name!r}; legal: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def format_of(dtype: torch.dtype) -> Format:
    """The format stored in ``dtype``; ``ValueError`` if it is not an FP8 type."""
    if dtype not in _BY_DTYPE:
        raise ValueError(f"{dtype} is not an FP8 type; expected one of {', '.join(map(str, _BY_DTYPE))}")
    return _BY_DTYPE[dtype]
