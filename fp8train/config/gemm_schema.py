"""The ``precision.gemm`` section: how the operands of FP8 matrix multiplications are quantised, and which
are.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fp8train.config.blocks import DIRECTED, Granularity
from fp8train.config.section import NonNegativeInt, PositiveInt, Section, contradiction


class QuantConfig(Section):
    """How one operand of one GEMM is quantised."""

    format: Literal["e4m3", "e5m2", "e2m1"]
    """FP8 format; ``e2m1``: FP4, simulated, for all operands or none."""
    granularity: Granularity = "tensor"
    """What shares a scale: the tensor; a ``row``, one vector that the GEMM contracts; 128 elements of such a
    vector (``block_1x128``), 32 (``mx_1x32``, OCP MX), or squares of 128x128. ``e2m1`` only: 16
    (``nv_1x16``) or squares of 16x16, below a scale of the tensor."""
    scale_source: Literal["current", "delayed", "constant", "mse"] = "current"
    """Where the scale comes from: ``current`` = this tensor's own amax; ``delayed`` = the amaxes of earlier
    steps; ``constant`` = ``2^constant_exponent``; ``mse`` = the power of two with the least squared
    error."""
    history: Annotated[int, Field(ge=1, le=1024)] = 16
    """``delayed`` only: steps whose amax is remembered."""
    reduce: Literal["max", "most_recent"] = "max"
    """``delayed`` only: the amax of the history that counts."""
    interval: PositiveInt = 1
    """``delayed`` only: compute the scale anew every this many steps."""
    constant_exponent: Annotated[int, Field(ge=-126, le=126)] | None = None
    """``constant`` only, and required there."""
    power_of_two: bool = True
    """Round the scale down to a power of two (never saturates; requantising is exact)."""
    margin: Annotated[int, Field(ge=0, le=8)] = 0
    """Leave this many powers of two between amax and the format's maximum."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Rounding of the payload: to nearest, ties to even; ``e2m1`` only: ``stochastic``."""
    hadamard: bool = False
    """``e2m1`` operands of grad_weight only, both or neither: a random Hadamard transform over 16 tokens
    comes before the cast."""

    @model_validator(mode="after")
    def _fits_the_source(self) -> QuantConfig:
        for key, source in (
            ("history", "delayed"),
            ("reduce", "delayed"),
            ("interval", "delayed"),
            ("constant_exponent", "constant"),
        ):
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and self.scale_source != source:
                raise contradiction(
                    f"{key} belongs to scale_source: {source}, but scale_source is {self.scale_source}",
                    key,
                    "scale_source",
                )
        self._fp4_only()
        self._granularity_fits_the_source()
        if self.scale_source == "mse":
            self._refuse_margin_and_fp32_scales()
        if self.scale_source == "constant":
            if self.constant_exponent is None:
                raise contradiction(
                    "scale_source: constant needs constant_exponent; the scale is 2^constant_exponent",
                    "constant_exponent",
                    "scale_source",
                )
            self._refuse_margin_and_fp32_scales()
        return self

    def _fp4_only(self) -> None:
        for key, given in (("rounding", self.rounding != "nearest"), ("hadamard", self.hadamard)):
            if given and self.format != "e2m1":
                raise contradiction(
                    f"{key}: {str(getattr(self, key)).lower()} is built for format: e2m1 only, but format is "
                    f"{self.format}; remove it",
                    key,
                    "format",
                )

    def _granularity_fits_the_source(self) -> None:
        if self.granularity != "tensor" and self.scale_source != "current":
            raise contradiction(
                f"granularity: {self.granularity} takes each scale from its own amax, but scale_source is "
                f"{self.scale_source}; write scale_source: current, or granularity: tensor",
                "granularity",
                "scale_source",
            )
        if self.granularity == "mx_1x32" and not self.power_of_two:
            raise contradiction(
                "granularity: mx_1x32 has powers of two as scales; remove power_of_two: false",
                "power_of_two",
                "granularity",
            )

    def _refuse_margin_and_fp32_scales(self) -> None:
        for key, neutral in (("margin", self.margin == 0), ("power_of_two", self.power_of_two)):
            if not neutral:
                raise contradiction(
                    f"{key} has no effect with scale_source: {self.scale_source}; remove it",
                    key,
                    "scale_source",
                )


def _refuse_two_e5m2(gemm: Section, first: str, second: str) -> None:
    """Hardware multiplies E4M3 by either format, but never E5M2 by E5M2."""
    if getattr(gemm, first).format == "e5m2" and getattr(gemm, second).format == "e5m2":
        raise contradiction(
            f"{first} and {second} are both e5m2, which no hardware multiplies; write e4m3 for one of them",
            f"{first}.format",
            f"{second}.format",
        )


class OutputGemmConfig(Section):
    """output = x @ weight.T"""

    x: QuantConfig
    """Activation entering the linear."""
    w: QuantConfig
    """Weight."""

    @model_validator(mode="after")
    def _formats(self) -> OutputGemmConfig:
        _refuse_two_e5m2(self, "x", "w")
        return self


class GradInputGemmConfig(Section):
    """grad_input = grad_output @ weight"""

    grad_output: QuantConfig
    """Gradient arriving at the linear."""
    w: QuantConfig
    """Weight."""

    @model_validator(mode="after")
    def _formats(self) -> GradInputGemmConfig:
        _refuse_two_e5m2(self, "grad_output", "w")
        return self


class GradWeightGemmConfig(Section):
    """grad_weight = grad_output.T @ x"""

    fp8: bool = True
    """Multiply in FP8. ``false`` multiplies the unquantised operands in the compute type and needs
    ``keep_x: bf16``."""
    grad_output: QuantConfig
    """Gradient arriving at the linear."""
    x: QuantConfig
    """Activation that entered the linear."""

    @model_validator(mode="after")
    def _formats(self) -> GradWeightGemmConfig:
        _refuse_two_e5m2(self, "grad_output", "x")
        return self


class GemmConfig(Section):
    """FP8 matrix multiplications of the hidden linears."""

    fp8: bool
    """Multiply in FP8. Filled by ``precision.level``; ``level: O0`` with ``fp8: true`` is the FP8-GEMMs-only
    baseline."""
    output: OutputGemmConfig
    """Forward GEMM."""
    grad_input: GradInputGemmConfig
    """Backward GEMM towards the input."""
    grad_weight: GradWeightGemmConfig
    """Backward GEMM towards the weight."""
    keep_x: Literal["same", "requantise", "second_copy", "bf16"] = "same"
    """What backward keeps of x: ``same`` the forward's FP8 operand; ``requantise`` recast it from the
    forward's operand; ``second_copy`` cast twice in forward; ``bf16`` keep the unquantised input."""
    keep_w: Literal["same", "second_copy", "requantise", "bf16"] = "same"
    """Likewise for the weight."""
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    """Glob patterns over parameter paths (``layers.0.*``) that stay in high precision; one that matches
    nothing is an error."""
    first_layers_bf16: NonNegativeInt = 0
    """Leave this many first blocks in high precision."""
    last_layers_bf16: NonNegativeInt = 0
    """Leave this many last blocks in high precision."""
    min_dim: PositiveInt | None = None
    """Opt-in speed filter: linears with a dimension below this stay in high precision."""
    fast_accumulation: bool = False
    """Hopper's reduced-precision accumulator for the forward GEMM."""
    smooth_swiglu: Literal["off", "token", "channel"] = "off"
    """Smooth-SwiGLU, for recipes with one scale per tensor, or none. ``token`` scales SwiGLU's output token
    by token around the down projection, so that an outlier costs its own token alone; ``channel`` moves the
    size of each channel into the down projection's weight, which is then cast for every micro-batch and
    cannot exist in FP8 alone (``precision.weights: compute``)."""

    @field_validator("smooth_swiglu", mode="before")
    @classmethod
    def _once_a_switch(cls, value: object) -> object:
        """``true`` meant ``token`` before there was a choice; checkpoints say so."""
        return {False: "off", True: "token"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _kept_operands(self) -> GemmConfig:
        if not self.fp8:
            return self
        for name, keep, forward, backward, backward_use in (
            ("x", self.keep_x, self.output.x, self.grad_weight.x, "grad_weight.x"),
            ("w", self.keep_w, self.output.w, self.grad_input.w, "grad_input.w"),
        ):
            keys = (f"keep_{name}", f"output.{name}", backward_use)
            if name == "x" and not self.grad_weight.fp8:
                self._keeps_unquantised_x()
                continue
            if keep == "same" and forward == backward and forward.granularity in DIRECTED:
                raise contradiction(
                    f"keep_{name}: same reuses the payload of output.{name}, but its scales "
                    f"({forward.granularity}) lie along the dimension which the output GEMM contracts, and "
                    f"{backward_use} contracts the other; write second_copy, requantise or bf16",
                    *keys,
                )
            if keep == "same" and forward != backward:
                raise contradiction(
                    f"keep_{name}: same reuses the payload of output.{name}, but {backward_use} is set "
                    "differently; make the two equal, or choose requantise, second_copy or bf16",
                    *keys,
                )
            directed = forward.granularity in DIRECTED
            if keep in ("requantise", "second_copy") and forward == backward and not directed:
                raise contradiction(
                    f"keep_{name}: {keep} changes nothing, because output.{name} and {backward_use} are "
                    "equal; write same",
                    *keys,
                )
        return self

    @model_validator(mode="after")
    def _hadamard(self) -> GemmConfig:
        """Built where it pays: both operands of the weight gradient, whose product it leaves as it is."""
        if not self.fp8:
            return self
        for use, operand in self.operands().items():
            if operand.hadamard and not use.startswith("grad_weight"):
                raise contradiction(
                    "hadamard: true is built for grad_weight's operands only; remove it", f"{use}.hadamard"
                )
        first, second = self.grad_weight.grad_output.hadamard, self.grad_weight.x.hadamard
        if self.grad_weight.fp8 and first != second:
            raise contradiction(
                "hadamard differs between the operands of grad_weight, whose product is the same only if "
                "both are transformed; write the same for both",
                "grad_weight.x.hadamard",
                "grad_weight.grad_output.hadamard",
            )
        return self

    def operands(self) -> dict[str, QuantConfig]:
        """How each operand is quantised, by use (``output.x``)."""
        return {
            "output.x": self.output.x,
            "output.w": self.output.w,
            "grad_input.grad_output": self.grad_input.grad_output,
            "grad_input.w": self.grad_input.w,
            "grad_weight.grad_output": self.grad_weight.grad_output,
            "grad_weight.x": self.grad_weight.x,
        }

    def _keeps_unquantised_x(self) -> None:
        if self.keep_x != "bf16":
            raise contradiction(
                f"grad_weight.fp8: false multiplies the unquantised input, but keep_x is {self.keep_x}; "
                "write keep_x: bf16",
                "keep_x",
                "grad_weight.fp8",
            )
