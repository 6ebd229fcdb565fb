"""How the three matrix multiplications of a linear are quantised, and what backward keeps.

Two operands each make six *uses*: ``output.x``, ``output.w``, ``grad_input.grad_output``, ``grad_input.w``,
``grad_weight.grad_output``, ``grad_weight.x``. Each use has its own :class:`QuantSpec`, because a scale that
varies along the dimension a GEMM contracts cannot be taken out of the sum: a tensor scaled per row for the
forward may need another scaling for the backward. :class:`LinearQuant` refuses the combinations that no GPU
multiplies (E5M2 x E5M2) or that make no sense (keeping *the same* payload under two different specs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.problems import Problem, illegal_choices, refuse

Keep = Literal["same", "requantise", "second_copy", "bf16"]

GEMMS = {
    "output": ("output.x", "output.w"),
    "grad_input": ("grad_input.grad_output", "grad_input.w"),
    "grad_weight": ("grad_weight.grad_output", "grad_weight.x"),
}
"""The two operand uses of each GEMM."""
_E4M3, _E5M2 = QuantSpec(E4M3), QuantSpec(E5M2)


@dataclass(frozen=True)
class LinearQuant:
    """The quantisation of one linear: six operand uses and what backward keeps.

    ``keep_x``/``keep_w``: ``same`` reuses the forward's payload; ``requantise`` recasts the forward's payload
    to the backward's spec (two roundings, no extra storage); ``second_copy`` casts the source twice in
    forward; ``bf16`` keeps the unquantised source. ``grad_weight_fp8: False`` multiplies the unquantised
    grad_output and x in the compute type; the specs of that GEMM then mean nothing.

    Raises:
        PrecisionError: a GEMM would multiply E5M2 by E5M2; ``same`` with two specs that differ or are
            directed; ``second_copy`` or ``requantise`` where ``same`` does the same; a grad_weight GEMM in
            high precision without ``keep_x: bf16``; E2M1 for some operands only.
    """

    output_x: QuantSpec = _E4M3
    output_w: QuantSpec = _E4M3
    grad_input_grad_output: QuantSpec = _E5M2
    grad_input_w: QuantSpec = _E4M3
    grad_weight_grad_output: QuantSpec = _E5M2
    grad_weight_x: QuantSpec = _E4M3
    keep_x: Keep = "same"
    keep_w: Keep = "same"
    fast_accumulation: bool = False
    grad_weight_fp8: bool = True

    def __post_init__(self) -> None:
        refuse(illegal_choices(self))
        refuse([*self._unmultipliable(), *self._nvfp4_in_part()])
        refuse([*self._hadamard_alone(), *self._kept_otherwise()])

    def operands(self) -> dict[str, QuantSpec]:
        """All six specs by use."""
        return {use: getattr(self, use.replace(".", "_")) for uses in GEMMS.values() for use in uses}

    def against_resident_weights(self) -> Iterator[Problem]:
        """Why the weight cannot exist in FP8 alone, written piece by piece from a master weight."""
        if self.keep_w == "bf16":
            yield Problem(
                "keep_w: bf16 needs weights in the compute type; write weights: compute, or another keep_w",
                ("keep_w",),
            )
        for use in ("output.w", "grad_input.w") if self.keep_w == "second_copy" else ("output.w",):
            spec = self.operands()[use]
            if spec.granularity != "tensor" or spec.scale_source == "mse":
                key = "scale_source" if spec.scale_source == "mse" else "granularity"
                yield Problem(
                    "weights: fp8 is written piece by piece with one scale from the amax of the whole, but "
                    f"{use}.{key} is {getattr(spec, key)}; write weights: compute, or a recipe with one "
                    "scale per tensor",
                    (f"{use}.{key}",),
                )
                return

    def in_fp8(self, gemm: str) -> bool:
        """Whether this one of :data:`GEMMS` multiplies quantised operands."""
        return self.grad_weight_fp8 or gemm != "grad_weight"

    @property
    def is_nvfp4(self) -> bool:
        """Whether its GEMMs simulate NVFP4."""
        return any(spec.is_nvfp4 for spec in self.quantised().values())

    def quantised(self) -> dict[str, QuantSpec]:
        """The specs that are used, by use."""
        specs = self.operands()
        return {use: specs[use] for gemm, uses in GEMMS.items() if self.in_fp8(gemm) for use in uses}

    def _unmultipliable(self) -> Iterator[Problem]:
        """Hardware multiplies E4M3 by either format, but never E5M2 by E5M2."""
        specs = self.operands()
        for uses in GEMMS.values():
            if all(specs[use].format is E5M2 for use in uses):
                first, second = (use.rpartition(".")[2] for use in uses)
                yield Problem(
                    f"{first} and {second} are both e5m2, which no hardware multiplies; write e4m3 for one "
                    "of them",
                    tuple(f"{use}.format" for use in uses),
                )

    def _nvfp4_in_part(self) -> Iterator[Problem]:
        specs = self.quantised()
        others = [use for use, spec in specs.items() if not spec.is_nvfp4]
        if self.is_nvfp4 and others:
            yield Problem(
                f"{others[0]} is {specs[others[0]].format.name} and others are e2m1; the simulation of NVFP4 "
                "has all operands of FP8 GEMMs in e2m1",
                (f"{others[0]}.format", *(f"{use}.format" for use in specs if use not in others)),
            )

    def _hadamard_alone(self) -> Iterator[Problem]:
        """Built where it pays: both operands of the weight gradient, whose product it leaves as it is."""
        for use, spec in self.quantised().items():
            if spec.hadamard and not use.startswith("grad_weight"):
                yield Problem(
                    "hadamard: true is built for grad_weight's operands only; remove it", (f"{use}.hadamard",)
                )
        if self.grad_weight_fp8 and self.grad_weight_grad_output.hadamard != self.grad_weight_x.hadamard:
            yield Problem(
                "hadamard differs between the operands of grad_weight, whose product is the same only if "
                "both are transformed; write the same for both",
                ("grad_weight.x.hadamard", "grad_weight.grad_output.hadamard"),
            )

    def _kept_otherwise(self) -> Iterator[Problem]:
        if self.grad_weight_fp8:
            yield from _misfit_of_keep("x", self.keep_x, self.output_x, self.grad_weight_x, "grad_weight.x")
        elif self.keep_x != "bf16":
            yield Problem(
                f"grad_weight.fp8: false multiplies the unquantised input, but keep_x is {self.keep_x}; "
                "write keep_x: bf16",
                ("keep_x", "grad_weight.fp8"),
            )
        yield from _misfit_of_keep("w", self.keep_w, self.output_w, self.grad_input_w, "grad_input.w")

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


def _misfit_of_keep(
    operand: str, keep: Keep, forward: QuantSpec, backward: QuantSpec, backward_use: str
) -> Iterator[Problem]:
    """What keeping an operand so would ignore or get wrong."""
    setting, use = f"keep_{operand}", f"output.{operand}"
    if keep == "same" and forward == backward and forward.directed:
        problem = (
            f"same reuses the payload of {use}, but its scales ({forward.granularity}) lie along the "
            f"dimension which the output GEMM contracts, and {backward_use} contracts the other; write "
            "second_copy, requantise or bf16"
        )
    elif keep == "same" and forward != backward:
        problem = (
            f"same reuses the payload of {use}, but {backward_use} is set differently; make the two equal, "
            "or choose requantise, second_copy or bf16"
        )
    elif keep in ("requantise", "second_copy") and forward.gives_codes_of(backward):
        problem = f"{keep} changes nothing, because {use} and {backward_use} are equal; write same"
    else:
        return
    yield Problem(f"{setting}: {problem}", (setting, use, backward_use))
