"""What "quantise this operand" means, as a frozen value.

A linear has three GEMMs with two operands each, so six *uses*: ``output.x``, ``output.w``,
``grad_input.grad_output``, ``grad_input.w``, ``grad_weight.grad_output``, ``grad_weight.x``. Each use has its
own :class:`QuantSpec`, because a scale that varies along the dimension a GEMM contracts cannot be taken out
of the sum: a tensor scaled per row for the forward may need another scaling for the backward.
:class:`LinearQuant` collects the six with what backward keeps, and refuses the combinations that no GPU
multiplies (E5M2 x E5M2) or that make no sense (keeping *the same* payload under two different specs).

A scale comes from one of four sources. ``current``: this very tensor's amax. ``delayed``: the amaxes of
earlier optimizer steps (Micikevicius et al. 2022; FP8-LM appendix A.2), which lets a kernel cast without
reading the tensor twice; :mod:`fp8train.numerics.scale_state` holds them. ``constant``: a power of two that
never changes. ``mse``: the power of two with the least squared error (:mod:`fp8train.numerics.mse_scale`).

A scale belongs to the whole tensor or, ``current`` ones only, to a row or block of it
(:mod:`fp8train.numerics.granularity`). Rows and 1xN blocks are *directed*: they lie along the dimension which
the GEMM contracts, so the forward's payload has the wrong scales for backward even if both are quantised by
equal specs. Blocks of 128x128 have no direction.

NVFP4 (``e2m1``) is a simulation (:mod:`fp8train.numerics.nvfp4`): all six operands or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fp8train.config.blocks import DIRECTED, TWO_LEVELS, Granularity
from fp8train.numerics.formats import E2M1, E4M3, E5M2, Format

ScaleSource = Literal["current", "delayed", "constant", "mse"]
Reduce = Literal["max", "most_recent"]
Rounding = Literal["nearest", "stochastic"]
Keep = Literal["same", "requantise", "second_copy", "bf16"]

MAX_MARGIN = 8  # beyond, E4M3 would be left with values below 1.75
MAX_HISTORY = 1024
MAX_CONSTANT = 126  # both 2^k and 2^-k are normal FP32 numbers


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
        ValueError: a number is out of range, or a setting is given that the scale source does not use.
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
        if self.scale_source not in get_args(ScaleSource):
            raise ValueError(
                f"scale_source: {self.scale_source!r}; legal: {', '.join(get_args(ScaleSource))}"
            )
        if not 0 <= self.margin <= MAX_MARGIN:
            raise ValueError(f"margin: {self.margin} powers of two; legal: 0 to {MAX_MARGIN}")
        self._check_granularity()
        self._check_nvfp4()
        self._check_delayed()
        self._check_constant()
        if self.scale_source == "mse" and (self.margin or not self.power_of_two):
            raise ValueError("scale_source: mse chooses among powers of two; remove power_of_two and margin")

    def _check_granularity(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity: {self.granularity!r}; legal: {', '.join(get_args(Granularity))}")
        if self.granularity != "tensor" and self.scale_source != "current":
            raise ValueError(
                f"granularity: {self.granularity} takes each scale from its own amax; write scale_source: "
                f"current, or granularity: tensor for scale_source: {self.scale_source}"
            )
        if self.granularity == "mx_1x32" and not self.power_of_two:
            raise ValueError("granularity: mx_1x32 has powers of two as scales; remove power_of_two: false")

    @property
    def is_nvfp4(self) -> bool:
        """Whether it is the simulation of NVFP4."""
        return self.format is E2M1

    def _check_nvfp4(self) -> None:
        if self.is_nvfp4 != (self.granularity in TWO_LEVELS):
            raise ValueError(
                f"granularity: {self.granularity} with format: {self.format.name}; e2m1 has nv_1x16 or "
                "nv_16x16, and nothing else has"
            )
        if not self.is_nvfp4:
            for key, given in (
                ("rounding: stochastic", self.rounding != "nearest"),
                ("hadamard: true", self.hadamard),
            ):
                if given:
                    raise ValueError(
                        f"{key} is built for e2m1 operands only, not {self.format.name}; remove it"
                    )
            return
        if self.power_of_two or self.margin:
            raise ValueError("e2m1 has FP32 scales from amax; write power_of_two: false and no margin")
        if self.granularity == "nv_16x16" and (self.rounding != "nearest" or self.hadamard):
            raise ValueError(
                "granularity: nv_16x16 serves two GEMMs with one copy; rounding: stochastic and "
                "hadamard: true belong to nv_1x16"
            )

    def _check_delayed(self) -> None:
        if not 1 <= self.history <= MAX_HISTORY:
            raise ValueError(f"history: {self.history} steps; legal: 1 to {MAX_HISTORY}")
        if self.reduce not in ("max", "most_recent"):
            raise ValueError(f"reduce: {self.reduce!r}; legal: max, most_recent")
        if self.interval < 1:
            raise ValueError(f"interval: {self.interval} steps; legal: 1 or more")
        if self.scale_source != "delayed":
            for key, default in (("history", 16), ("reduce", "max"), ("interval", 1)):
                if (value := getattr(self, key)) != default:
                    raise ValueError(
                        f"{key}: {value} has no effect with scale_source: {self.scale_source}; "
                        f"leave it at {default} or set scale_source: delayed"
                    )

    def _check_constant(self) -> None:
        k = self.constant_exponent
        if self.scale_source != "constant":
            if k is not None:
                raise ValueError(
                    f"constant_exponent: {k} has no effect with scale_source: {self.scale_source}; "
                    "remove it or set scale_source: constant"
                )
            return
        if k is None:
            raise ValueError(
                "scale_source: constant needs constant_exponent; the scale is 2^constant_exponent"
            )
        if not -MAX_CONSTANT <= k <= MAX_CONSTANT:
            raise ValueError(f"constant_exponent: {k}; legal: -{MAX_CONSTANT} to {MAX_CONSTANT}")
        if not self.power_of_two:
            raise ValueError("power_of_two: false has no effect with scale_source: constant; remove it")
        if self.margin:
            raise ValueError(
                f"margin: {self.margin} has no effect with scale_source: constant; "
                "lower constant_exponent instead"
            )

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


@dataclass(frozen=True)
class LinearQuant:
    """The quantisation of one linear: six operand uses and what backward keeps.

    ``keep_x``/``keep_w``: ``same`` reuses the forward's payload; ``requantise`` recasts the forward's payload
    to the backward's spec (two roundings, no extra storage); ``second_copy`` casts the source twice in
    forward; ``bf16`` keeps the unquantised source. ``grad_weight_fp8: False`` multiplies the unquantised
    grad_output and x in the compute type; the specs of that GEMM then mean nothing.

    Raises:
        ValueError: a GEMM would multiply E5M2 by E5M2; ``same`` with two specs that differ or are directed;
            ``second_copy`` or ``requantise`` where ``same`` does the same; a grad_weight GEMM in high
            precision without ``keep_x: bf16``.
    """

    output_x: QuantSpec = QuantSpec(E4M3)
    output_w: QuantSpec = QuantSpec(E4M3)
    grad_input_grad_output: QuantSpec = QuantSpec(E5M2)
    grad_input_w: QuantSpec = QuantSpec(E4M3)
    grad_weight_grad_output: QuantSpec = QuantSpec(E5M2)
    grad_weight_x: QuantSpec = QuantSpec(E4M3)
    keep_x: Keep = "same"
    keep_w: Keep = "same"
    fast_accumulation: bool = False
    grad_weight_fp8: bool = True

    def __post_init__(self) -> None:
        if not self.grad_weight_fp8 and self.keep_x != "bf16":
            raise ValueError(
                "precision.gemm.grad_weight.fp8: false multiplies the unquantised input, but keep_x is "
                f"{self.keep_x}; write precision.gemm.keep_x: bf16"
            )
        for gemm, a, b in (
            ("output", self.output_x, self.output_w),
            ("grad_input", self.grad_input_grad_output, self.grad_input_w),
            ("grad_weight", self.grad_weight_grad_output, self.grad_weight_x),
        ):
            if a.format is E5M2 and b.format is E5M2:
                raise ValueError(
                    f"precision.gemm.{gemm} multiplies E5M2 by E5M2, which no FP8 tensor core does; "
                    "make one operand e4m3"
                )
        self._check_nvfp4()
        self._check_keep("x", self.keep_x, self.output_x, self.grad_weight_x, "grad_weight.x")
        self._check_keep("w", self.keep_w, self.output_w, self.grad_input_w, "grad_input.w")

    def _check_nvfp4(self) -> None:
        operands = self._uses()
        others = [use for use, spec in operands.items() if not spec.is_nvfp4]
        if self.is_nvfp4 and others:
            raise ValueError(
                f"precision.gemm.{others[0]} is {operands[others[0]].format.name} and others are e2m1; the "
                "simulation of NVFP4 has all operands of FP8 GEMMs in e2m1"
            )
        for use, spec in operands.items():
            if spec.hadamard and not use.startswith("grad_weight"):
                raise ValueError(
                    f"precision.gemm.{use}.hadamard: true is built for grad_weight's operands only; remove it"
                )
        if self.grad_weight_fp8 and self.grad_weight_grad_output.hadamard != self.grad_weight_x.hadamard:
            raise ValueError(
                "precision.gemm.grad_weight.x.hadamard and .grad_output.hadamard differ; their product is "
                "the same only if both are transformed"
            )

    @property
    def is_nvfp4(self) -> bool:
        """Whether its GEMMs simulate NVFP4."""
        return any(spec.is_nvfp4 for spec in self._uses().values())

    def _uses(self) -> dict[str, QuantSpec]:
        """Operands that are quantised, by use."""
        uses = {
            "output.x": self.output_x,
            "output.w": self.output_w,
            "grad_input.grad_output": self.grad_input_grad_output,
            "grad_input.w": self.grad_input_w,
        }
        if self.grad_weight_fp8:
            uses["grad_weight.grad_output"] = self.grad_weight_grad_output
            uses["grad_weight.x"] = self.grad_weight_x
        return uses

    @staticmethod
    def _check_keep(
        operand: str, keep: Keep, forward: QuantSpec, backward: QuantSpec, backward_use: str
    ) -> None:
        where = f"precision.gemm.keep_{operand}: {keep}"
        if keep == "same" and forward == backward and forward.directed:
            raise ValueError(
                f"{where} reuses the payload of output.{operand}, but its scales lie along the dimension "
                f"that the output GEMM contracts ({forward}) and {backward_use} contracts the other; use "
                "second_copy, requantise or bf16"
            )
        if keep == "same" and forward != backward:
            raise ValueError(
                f"{where} reuses the payload of output.{operand} ({forward}), "
                f"but {backward_use} asks for {backward}; "
                "use requantise, second_copy or bf16, or make the two equal"
            )
        if keep in ("requantise", "second_copy") and forward.gives_codes_of(backward):
            raise ValueError(
                f"{where} has no effect: output.{operand} and {backward_use} are both {forward}; use same"
            )

    @property
    def shares_grad_output(self) -> bool:
        """Whether grad_input and grad_weight read one cast of grad_output."""
        return self.grad_input_grad_output.gives_codes_of(self.grad_weight_grad_output)

    def casts(self) -> dict[str, QuantSpec]:
        """``{use: spec}`` of the uses that are cast on their own; one that shares a payload is not listed."""
        casts = {
            "output.x": self.output_x,
            "output.w": self.output_w,
            "grad_input.grad_output": self.grad_input_grad_output,
        }
        if self.keep_x != "same" and self.grad_weight_fp8:
            casts["grad_weight.x"] = self.grad_weight_x
        if self.keep_w != "same":
            casts["grad_input.w"] = self.grad_input_w
        if not self.shares_grad_output and self.grad_weight_fp8:
            casts["grad_weight.grad_output"] = self.grad_weight_grad_output
        return casts

    def __str__(self) -> str:
        parts = [f"x={self.output_x}", f"w={self.output_w}", f"grad_output={self.grad_input_grad_output}"]
        if not self.grad_weight_fp8:
            parts.append("grad_weight=high precision")
        elif not self.shares_grad_output:
            parts.append(f"grad_weight.grad_output={self.grad_weight_grad_output}")
        if self.keep_x != "same" and self.grad_weight_fp8:
            parts.append(f"keep_x={self.keep_x}({self.grad_weight_x})")
        if self.keep_w != "same":
            parts.append(f"keep_w={self.keep_w}({self.grad_input_w})")
        if self.fast_accumulation:
            parts.append("fast_accumulation")
        return " ".join(parts)
