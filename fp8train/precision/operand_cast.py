"""How one operand of a matrix multiplication is quantised.

A scale comes from one of four sources. ``current``: this very tensor's amax. ``delayed``: the amaxes of
earlier optimizer steps (Micikevicius et al. 2022; FP8-LM appendix A.2), which lets a kernel cast without
reading the tensor twice; :mod:`fp8train.numerics.scale_state` holds them. ``constant``: a power of two that
never changes. ``mse``: the power of two with the least squared error (:mod:`fp8train.numerics.mse_scale`).

A scale belongs to the whole tensor or, ``current`` ones only, to a row or block of it
(:mod:`fp8train.numerics.granularity`). Rows and 1xN blocks are *directed*: they lie along the dimension which
the GEMM contracts, so the forward's payload has the wrong scales for backward even if both are quantised by
equal specs. Blocks of 128x128 have no direction.

NVFP4 (``e2m1``) is a simulation (:mod:`fp8train.numerics.nvfp4`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fp8train.precision.number_formats import E2M1, Format
from fp8train.precision.problems import Problem, Reads, illegal_choices, out_of_range, refuse, unread
from fp8train.precision.scale_blocks import DIRECTED, TWO_LEVELS, Granularity

ScaleSource = Literal["current", "delayed", "constant", "mse"]
Reduce = Literal["max", "most_recent"]
Rounding = Literal["nearest", "stochastic"]

MAX_MARGIN = 8  # beyond, E4M3 would be left with values below 1.75
MAX_HISTORY = 1024
MAX_CONSTANT = 126  # both 2^k and 2^-k are normal FP32 numbers

CAST_READS = (
    Reads(("history", "reduce", "interval"), "scale_source", ("delayed",)),
    Reads(("constant_exponent",), "scale_source", ("constant",)),
    Reads(("power_of_two", "margin"), "scale_source", ("current", "delayed")),
)
FP4_READS = (Reads(("rounding", "hadamard"), "format", ("e2m1",)),)


@dataclass(frozen=True)
class QuantSpec:
    """How one operand use is quantised: format, where its scale comes from, and what shares it.

    Attributes:
        format: FP8 format of the payload, or E2M1.
        granularity: what shares one scale: the ``tensor``; a ``row``, that is, a vector which the GEMM
            contracts; 1x128 or 1x32 elements of such a vector; or a square of 128x128. E2M1: 1x16 or 16x16.
        scale_source: where the scale comes from: ``current`` is this tensor's own amax, ``delayed`` the
            amaxes of earlier steps, ``constant`` a fixed number, ``mse`` the power of two with the least
            squared error.
        power_of_two: scales are powers of two, rounded down so that amax never saturates.
        margin: powers of two left free between the scaled amax and the format's maximum, 0 to 8.
        history: delayed only: steps whose amax is remembered, 1 to 1024.
        reduce: delayed only: the amax that counts is the ``max`` over the history or its ``most_recent``.
        interval: delayed only: the scale is computed anew every so many steps, at least 1.
        constant_exponent: constant only, and required there: the scale is ``2^constant_exponent``.
        rounding: E2M1 only: of its codes.
        hadamard: E2M1 only: a random Hadamard transform along the contracted dimension comes first.

    Raises:
        PrecisionError: a number is out of range, or settings do not fit together.
    """

    format: Format
    granularity: Granularity = "tensor"
    scale_source: ScaleSource = "current"
    power_of_two: bool = True
    margin: int = 0
    history: int = 16
    reduce: Reduce = "max"
    interval: int = 1
    constant_exponent: int | None = None
    rounding: Rounding = "nearest"
    hadamard: bool = False

    def __post_init__(self) -> None:
        refuse([*illegal_choices(self), *self._out_of_range()])
        refuse(
            [*unread(self, CAST_READS + FP4_READS), *self._against_the_source(), *self._against_the_format()]
        )

    def _out_of_range(self) -> Iterator[Problem]:
        yield from out_of_range(self, "margin", 0, MAX_MARGIN, "powers of two")
        yield from out_of_range(self, "history", 1, MAX_HISTORY, "steps")
        yield from out_of_range(self, "interval", 1, None, "steps")
        if self.constant_exponent is not None:
            yield from out_of_range(
                self, "constant_exponent", -MAX_CONSTANT, MAX_CONSTANT, "as exponent of 2"
            )

    def _against_the_source(self) -> Iterator[Problem]:
        source = self.scale_source
        if source == "constant" and self.constant_exponent is None:
            yield Problem(
                "scale_source: constant needs constant_exponent; the scale is 2^constant_exponent",
                ("constant_exponent", "scale_source"),
            )
        if self.granularity != "tensor" and source != "current":
            yield Problem(
                f"granularity: {self.granularity} takes each scale from its own amax, but scale_source is "
                f"{source}; write scale_source: current, or granularity: tensor",
                ("granularity", "scale_source"),
            )
        if self.granularity == "mx_1x32" and not self.power_of_two:
            yield Problem(
                "granularity: mx_1x32 has powers of two as scales; remove power_of_two: false",
                ("power_of_two", "granularity"),
            )

    def _against_the_format(self) -> Iterator[Problem]:
        if self.is_nvfp4 != (self.granularity in TWO_LEVELS):
            yield Problem(
                f"granularity: {self.granularity} with format: {self.format.name}; e2m1 has nv_1x16 or "
                "nv_16x16, and nothing else has",
                ("granularity", "format"),
            )
        if not self.is_nvfp4:
            return
        if self.power_of_two or self.margin:
            yield Problem(
                "e2m1 has FP32 scales from amax; write power_of_two: false and no margin",
                ("power_of_two" if self.power_of_two else "margin", "format"),
            )
        if self.granularity == "nv_16x16" and (self.rounding == "stochastic" or self.hadamard):
            yield Problem(
                "granularity: nv_16x16 serves two GEMMs with one copy; rounding: stochastic and "
                "hadamard: true belong to nv_1x16",
                ("hadamard" if self.hadamard else "rounding", "granularity"),
            )

    @property
    def is_nvfp4(self) -> bool:
        """Whether it is the simulation of NVFP4."""
        return self.format is E2M1

    @property
    def directed(self) -> bool:
        """Whether scales vary along one dimension only, so that each GEMM needs codes of its own."""
        return self.granularity in DIRECTED

    def gives_codes_of(self, other: QuantSpec) -> bool:
        """Whether one payload serves a GEMM that contracts one dimension by this spec, and a GEMM that
        contracts the other by ``other``."""
        return self == other and not self.directed

    def __str__(self) -> str:
        scale = "pow2" if self.power_of_two else "fp32"
        return (
            f"{self.format.name}:{self._source()}/{self.granularity}/{scale}"
            + (f"-{self.margin}" if self.margin else "")
            + ("/stochastic" if self.rounding == "stochastic" else "")
            + ("/hadamard" if self.hadamard else "")
        )

    def _source(self) -> str:
        if self.scale_source in ("current", "mse"):
            return {"current": "cur", "mse": "mse"}[self.scale_source]
        if self.scale_source == "constant":
            return f"constant2^{self.constant_exponent}"
        reduce = {"max": "max", "most_recent": "recent"}[self.reduce]
        return f"delayed{self.history}{reduce}" + (f"@{self.interval}" if self.interval > 1 else "")
