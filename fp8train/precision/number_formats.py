"""The small number formats, described by their definition: two of FP8 (OCP), FP4 and FP16.

A code is sign | exponent | mantissa. With bias ``b`` and ``m`` mantissa bits, a code with exponent field
``e > 0`` and mantissa field ``f`` stands for ``2^(e-b) · (1 + f/2^m)``; ``e = 0`` is subnormal: ``2^(1-b) ·
f/2^m``. E4M3 has no infinity and one NaN per sign (all ones); E5M2 reserves its top exponent for infinities
and NaNs as IEEE does. The largest finite values of both are ``1.75 · 2^k``, which
:mod:`fp8train.numerics.scale` relies on. :mod:`fp8train.numerics.formats` knows torch's types for them.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); OCP OFP8 specification 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A floating-point format of few bits.

    Attributes:
        name: in lower case, as the configuration writes it.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        bias: exponent bias.
        max: largest finite value.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value: ``floor(log2(max))``."""
        return int(self.max).bit_length() - 1


E4M3 = Format("e4m3", exponent_bits=4, mantissa_bits=3, bias=7, max=448.0)
E5M2 = Format("e5m2", exponent_bits=5, mantissa_bits=2, bias=15, max=57344.0)
E2M1 = Format("e2m1", exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
"""FP4 (OCP MX 1.0), for simulation only (:mod:`fp8train.numerics.nvfp4`): nothing is stored in it."""
FP16 = Format("fp16", exponent_bits=5, mantissa_bits=10, bias=15, max=65504.0)
"""Of optimizer states, with scales. Its largest value is just below 2^16 instead of 1.75 · 2^15: scales made
for the latter leave it a little room."""

_BY_NAME = {fmt.name: fmt for fmt in (E4M3, E5M2, E2M1)}


def format_by_name(name: str) -> Format:
    """The format of GEMM operands called ``name``; ``ValueError`` names the legal ones."""
    if name not in _BY_NAME:
        raise ValueError(f"unknown FP8 format {name!r}; legal: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
