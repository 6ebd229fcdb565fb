"""The ``precision.gemm`` section: how the operands of FP8 matrix multiplications are quantised, and which
are.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fp8train.config.section import NonNegativeInt, PositiveInt, Section, ValueSection, build
from fp8train.precision.linear_gemms import GEMMS, Keep, LinearQuant
from fp8train.precision.number_formats import format_by_name
from fp8train.precision.operand_cast import (
    MAX_CONSTANT,
    MAX_HISTORY,
    MAX_MARGIN,
    QuantSpec,
    Reduce,
    Rounding,
    ScaleSource,
)
from fp8train.precision.precision import Smoothing
from fp8train.precision.scale_blocks import Granularity


class QuantConfig(ValueSection):
    """How one operand of one GEMM is quantised."""

    format: Literal["e4m3", "e5m2", "e2m1"]
    """FP8 format; ``e2m1``: FP4, simulated, for all operands or none."""
    granularity: Granularity = "tensor"
    """What shares a scale: the tensor; a ``row``, one vector that the GEMM contracts; 128 elements of such a
    vector (``block_1x128``), 32 (``mx_1x32``, OCP MX), or squares of 128x128. ``e2m1`` only: 16
    (``nv_1x16``) or squares of 16x16, below a scale of the tensor."""
    scale_source: ScaleSource = "current"
    """Where the scale comes from: ``current`` = this tensor's own amax; ``delayed`` = the amaxes of earlier
    steps; ``constant`` = ``2^constant_exponent``; ``mse`` = the power of two with the least squared
    error."""
    history: Annotated[int, Field(ge=1, le=MAX_HISTORY)] = 16
    """``delayed`` only: steps whose amax is remembered."""
    reduce: Reduce = "max"
    """``delayed`` only: the amax of the history that counts."""
    interval: PositiveInt = 1
    """``delayed`` only: compute the scale anew every this many steps."""
    constant_exponent: Annotated[int, Field(ge=-MAX_CONSTANT, le=MAX_CONSTANT)] | None = None
    """``constant`` only, and required there."""
    power_of_two: bool = True
    """Round the scale down to a power of two (never saturates; requantising is exact)."""
    margin: Annotated[int, Field(ge=0, le=MAX_MARGIN)] = 0
    """Leave this many powers of two between amax and the format's maximum."""
    rounding: Rounding = "nearest"
    """Rounding of the payload: to nearest, ties to even; ``e2m1`` only: ``stochastic``."""
    hadamard: bool = False
    """``e2m1`` operands of grad_weight only, both or neither: a random Hadamard transform over 16 tokens
    comes before the cast."""

    def value(self) -> QuantSpec:
        """The value that casts take."""
        return build(QuantSpec, self, format=format_by_name(self.format))


class OutputGemmConfig(Section):
    """output = x @ weight.T"""

    x: QuantConfig
    """Activation entering the linear."""
    w: QuantConfig
    """Weight."""


class GradInputGemmConfig(Section):
    """grad_input = grad_output @ weight"""

    grad_output: QuantConfig
    """Gradient arriving at the linear."""
    w: QuantConfig
    """Weight."""


class GradWeightGemmConfig(Section):
    """grad_weight = grad_output.T @ x"""

    fp8: bool = True
    """Multiply in FP8. ``false`` multiplies the unquantised operands in the compute type and needs
    ``keep_x: bf16``."""
    grad_output: QuantConfig
    """Gradient arriving at the linear."""
    x: QuantConfig
    """Activation that entered the linear."""


class GemmConfig(ValueSection):
    """FP8 matrix multiplications of the hidden linears, and of the head if it is asked for."""

    fp8: bool
    """Multiply in FP8. Filled by ``precision.level``; ``level: O0`` with ``fp8: true`` is the FP8-GEMMs-only
    baseline."""
    output: OutputGemmConfig
    """Forward GEMM."""
    grad_input: GradInputGemmConfig
    """Backward GEMM towards the input."""
    grad_weight: GradWeightGemmConfig
    """Backward GEMM towards the weight."""
    keep_x: Keep = "same"
    """What backward keeps of x: ``same`` the forward's FP8 operand; ``requantise`` recast it from the
    forward's operand; ``second_copy`` cast twice in forward; ``bf16`` keep the unquantised input."""
    keep_w: Keep = "same"
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
    """CUDA only: the tensor cores' fast accumulator, of fewer bits, for the forward GEMM; backward keeps the
    full one. Filled by ``precision.level``, for scales of tensors or rows."""
    head: Literal["compute", "fp8"] = "compute"
    """GEMMs of the output head. ``fp8``: hidden states and weight E4M3, the gradient of logits E5M2, one
    scale per tensor under every recipe (``layers/fp8_head.py``); its gradient and states stay as they are."""
    smooth_swiglu: Smoothing = "off"
    """Smooth-SwiGLU, for recipes with one scale per tensor, or none. ``token`` scales SwiGLU's output token
    by token around the down projection, so that an outlier costs its own token alone; ``channel`` moves the
    size of each channel into the down projection's weight, which is then cast for every micro-batch and
    cannot exist in FP8 alone (``precision.weights: compute``)."""

    @field_validator("smooth_swiglu", mode="before")
    @classmethod
    def _once_a_switch(cls, value: object) -> object:
        """``true`` meant ``token`` before there was a choice; checkpoints say so."""
        return {False: "off", True: "token"}[value] if isinstance(value, bool) else value

    def value(self) -> LinearQuant | None:
        """The value that linears take; None if they multiply in high precision."""
        if not self.fp8:
            return None
        uses = {use.replace(".", "_"): attrgetter(use)(self).value() for use in chain(*GEMMS.values())}
        return build(LinearQuant, self, grad_weight_fp8=self.grad_weight.fp8, **uses)
