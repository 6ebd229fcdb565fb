"""What "quantise this operand" means, as a frozen value.

A linear has three GEMMs with two operands each, so six *uses*: ``output.x``, ``output.w``,
``grad_input.grad_output``, ``grad_input.w``, ``grad_weight.grad_output``, ``grad_weight.x``. Each use has its
own :class:`QuantSpec`, because a scale that varies along the dimension a GEMM contracts cannot be taken out
of the sum: a tensor scaled per row for the forward may need another scaling for the backward.
:class:`LinearQuant` collects the six with what backward keeps, and refuses the combinations that no GPU
multiplies (E5M2 x E5M2) or that make no sense (keeping *the same* payload under two different specs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8train.numerics.formats import E4M3, E5M2, Format

Granularity = Literal["tensor"]
ScaleSource = Literal["current"]
Keep = Literal["same", "requantise", "second_copy", "bf16"]

MAX_MARGIN = 8  # beyond, E4M3 would be left with values below 1.75


@dataclass(frozen=True)
class QuantSpec:
    """How one operand use is quantised.

    Attributes:
        format: FP8 format of the payload.
        granularity: what shares one scale.
        scale_source: where the scale comes from; ``current`` is this tensor's own amax.
        power_of_two: scales are powers of two, rounded down so that amax never saturates.
        margin: powers of two left free between the scaled amax and the format's maximum, 0 to 8.

    Raises:
        ValueError: ``margin`` is outside 0 to 8.
    """

    format: Format
    granularity: Granularity = "tensor"
    scale_source: ScaleSource = "current"
    power_of_two: bool = True
    margin: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= MAX_MARGIN:
            raise ValueError(f"margin: {self.margin} powers of two; legal: 0 to {MAX_MARGIN}")

    def __str__(self) -> str:
        source = {"current": "cur"}[self.scale_source]
        scale = "pow2" if self.power_of_two else "fp32"
        return f"{self.format.name}:{source}/{self.granularity}/{scale}" + (
            f"-{self.margin}" if self.margin else ""
        )


@dataclass(frozen=True)
class LinearQuant:
    """The quantisation of one linear: six operand uses and what backward keeps.

    ``keep_x``/``keep_w``: ``same`` reuses the forward's payload; ``requantise`` recasts the forward's payload
    to the backward's spec (two roundings, no extra storage); ``second_copy`` casts the source twice in
    forward; ``bf16`` keeps the unquantised source.

    Raises:
        ValueError: a GEMM would multiply E5M2 by E5M2; ``same`` with two specs that differ; ``second_copy``
            or ``requantise`` with equal specs (they would change nothing).
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

    def __post_init__(self) -> None:
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
        self._check_keep("x", self.keep_x, self.output_x, self.grad_weight_x, "grad_weight.x")
        self._check_keep("w", self.keep_w, self.output_w, self.grad_input_w, "grad_input.w")

    @staticmethod
    def _check_keep(
        operand: str, keep: Keep, forward: QuantSpec, backward: QuantSpec, backward_use: str
    ) -> None:
        where = f"precision.gemm.keep_{operand}: {keep}"
        if keep == "same" and forward != backward:
            raise ValueError(
                f"{where} reuses the payload of output.{operand} ({forward}), "
                f"but {backward_use} asks for {backward}; "
                "use requantise, second_copy or bf16, or make the two equal"
            )
        if keep in ("requantise", "second_copy") and forward == backward:
            raise ValueError(
                f"{where} has no effect: output.{operand} and {backward_use} are both {forward}; use same"
            )

    def __str__(self) -> str:
        parts = [f"x={self.output_x}", f"w={self.output_w}", f"grad_output={self.grad_input_grad_output}"]
        if self.grad_weight_grad_output != self.grad_input_grad_output:
            parts.append(f"grad_weight.grad_output={self.grad_weight_grad_output}")
        if self.keep_x != "same":
            parts.append(f"keep_x={self.keep_x}({self.grad_weight_x})")
        if self.keep_w != "same":
            parts.append(f"keep_w={self.keep_w}({self.grad_input_w})")
        if self.fast_accumulation:
            parts.append("fast_accumulation")
        return " ".join(parts)
