"""The ``precision`` section: what is FP8, in which format, and what is not.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fp8train.config.gemm_schema import GemmConfig
from fp8train.config.guard_schema import GuardConfig
from fp8train.config.recipe_registry import DEFAULT_RECIPE, RECIPE_NAMES, described
from fp8train.config.section import (
    PositiveFloat,
    PositiveInt,
    Section,
    ValueSection,
    build,
    contradiction,
)
from fp8train.precision.operand_cast import Rounding
from fp8train.precision.state_formats import StateFormat, StateFormats, StateGranularity


class Fp8GradientConfig(Section):
    """Weight gradients of the linears that multiply in FP8, where ``format`` is an FP8 one."""

    accumulate: Literal["fp32", "bf16", "fp8"]
    """Type in which micro-batches add up before the one cast. ``fp8`` (with ``shared_scale`` only) casts
    after each addition, as MS-AMP does, and loses small contributions."""
    reduce: Literal["exchange", "shared_scale", "exact", "bf16", "fp32"]
    """Sum over data-parallel ranks. ``exchange``: FP8 on the wire, FP32 in the sum, an error that does not
    grow with the ranks. ``shared_scale``: FP8-LM's sum in FP8 with one scale per tensor and auto-scaling.
    ``exact``: integer sums, the same bits for any number of ranks and micro-batches. ``bf16``/``fp32``:
    reduce in that type, store in FP8."""
    block: Annotated[int, Field(ge=32, le=128)]
    """Most elements of a row that share a scale; the largest divisor of the row up to this is taken."""
    error_feedback: bool = False
    """``exchange`` only: add what the cast lost to the next step's gradient (2 bytes a parameter)."""
    node_size: PositiveInt | None = None
    """``exchange`` only: ranks that reduce among themselves first (a node's) before anything travels between
    nodes; default: one exchange over all ranks. Must divide the data-parallel ranks."""
    between_nodes: Literal["fp8", "bf16"] = "fp8"
    """Type between nodes, where ``node_size`` is set."""
    sum: Literal["ring", "tree", "native"] = "ring"
    """``shared_scale`` only: who adds FP8. ``ring`` and ``tree`` hop by hop on any backend; ``native``:
    NCCL's own FP8 sum (2.24.3 or newer, Hopper)."""
    mu_criterion: Literal["count", "any"] = "count"
    """``shared_scale`` only: what halves the auto-scaling factor: a share of entries at the format's maximum
    (``mu_threshold``), or a single one."""
    mu_threshold: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """``mu_criterion: count`` only: that share (FP8-LM: 0.001 %)."""
    mu_window: PositiveInt = 1000
    """``shared_scale`` only: quiet steps that double the factor."""
    mu_initial: Literal["one_over_ranks", "one_over_root_ranks", "one"] = "one_over_ranks"
    """``shared_scale`` only: the factor before the first step, for N data-parallel ranks: 1/N (no sum can
    overflow), 1/sqrt(N) (FP8-LM's own implementation; its paper is silent), or 1."""

    @model_validator(mode="after")
    def _fits_the_reduction(self) -> Fp8GradientConfig:
        for key, needs in (
            ("sum", "shared_scale"),
            ("mu_criterion", "shared_scale"),
            ("mu_threshold", "shared_scale"),
            ("mu_window", "shared_scale"),
            ("mu_initial", "shared_scale"),
            ("error_feedback", "exchange"),
            ("node_size", "exchange"),
        ):
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and self.reduce != needs:
                raise contradiction(
                    f"{key} belongs to reduce: {needs}, but reduce is {self.reduce}", key, "reduce"
                )
        if self.accumulate == "fp8" and self.reduce != "shared_scale":
            raise contradiction(
                "accumulate: fp8 is what reduce: shared_scale offers (fidelity to MS-AMP), but reduce is "
                f"{self.reduce}; write accumulate: bf16",
                "accumulate",
                "reduce",
            )
        return self


class GradientConfig(Section):
    """Weight gradients between backward and optimizer."""

    accumulate: Literal["fp32", "bf16"]
    """Storage of high-precision gradients while micro-batches add up."""
    reduce: Literal["fp32", "bf16"]
    """Their type on the wire of the data-parallel all-reduce."""
    bucket_mib: PositiveFloat = 25.0
    """Gradients are reduced in buckets of about this size, while backward goes on."""
    format: Literal["high_precision", "e4m3", "e5m2"]
    """Storage of the gradients of linears that multiply in FP8; embedding, head, norms and biases always keep
    high precision."""
    fp8: Fp8GradientConfig
    """How FP8 gradients are accumulated and reduced."""


class StateFormatConfig(ValueSection):
    """How one optimizer state of the linears that multiply in FP8 is stored."""

    format: Literal["fp32", "bf16", "fp16_scaled", "bf16_remainder", "e4m3", "e5m2"]
    """``fp16_scaled``: FP16 with power-of-two scales; ``bf16_remainder`` (master only): a BF16 weight and
    the 16 bits that it lacks, exact FP32."""
    granularity: StateGranularity = "block"
    """What shares a scale, for ``fp16_scaled`` and FP8: a block of a row, or the tensor (as FP8-LM; takes two
    passes)."""
    rounding: Rounding = "nearest"
    """``stochastic`` keeps updates smaller than half a unit on average; reproducible."""
    expand: bool = False
    """FP8 blocks only: stretch each block's range over the format's (COAT)."""
    sqrt: bool = False
    """Second moment only: store its root, which needs half the exponents."""

    def value(self) -> StateFormat:
        """The value that the optimizer takes."""
        return build(StateFormat, self)


class StateConfig(ValueSection):
    """Optimizer states of the linears that multiply in FP8; all other parameters keep FP32 states."""

    plan: Literal["default", "coat", "e4m3_e5m2"] = "default"
    """Fills formats over those of level and profile; AdamW only. ``coat``: both moments in E4M3 blocks with
    expanded ranges (COAT), the master as the level has it. ``e4m3_e5m2``: first moment E4M3, second E5M2,
    master FP16, one scale per tensor each (Fishman et al. 2024): small second moments become zero."""
    master: StateFormatConfig
    """Master weights."""
    exp_avg: StateFormatConfig
    """First moment."""
    exp_avg_sq: StateFormatConfig
    """Second moment."""
    bounded_update: bool = True
    """AdamW with a moment in 8 or 16 bits only: no step is longer than one of exact moments could be, so that
    a second moment that was rounded to zero does not divide by ``eps``: ``update_rules/adamw.py``."""

    def value(self) -> StateFormats:
        """The value that the optimizer takes."""
        return build(StateFormats, self)


class TrafficConfig(Section):
    """What tensor-, pipeline- and ZeRO-parallel ranks send each other; of FP8 linears only. ``compute``: the
    compute type."""

    activations: Literal["compute", "fp8"]
    """Inputs of column-parallel linears, gathered in forward and again in backward: the FP8 operands that
    the GEMM reads anyway, so nothing is lost."""
    grad_output: Literal["compute", "fp8"]
    """Output gradients of row-parallel linears, gathered in backward: likewise."""
    grad_input: Literal["compute", "fp8"]
    """Input gradients of column-parallel linears, reduce-scattered in backward: ``fp8`` sends E4M3 codes with
    block scales and adds in FP32 (``exchange``)."""
    output: Literal["compute", "fp8"] = "compute"
    """Outputs of row-parallel linears, reduce-scattered in forward; ``fp8`` costs accuracy in every forward:
    check the loss."""
    weights: Literal["compute", "fp8"]
    """New weights from their ZeRO owners: the FP8 operands themselves."""
    pipeline: Literal["compute", "fp8"] = "compute"
    """Activations and their gradients between pipeline stages; ``fp8``: E4M3 and E5M2 codes with block
    scales, one more rounding at every boundary between ranks: check the loss."""


class PrecisionConfig(Section):
    """Number formats, from the level down to one operand. Later wins: level, recipe, profile, explicit
    fields."""

    level: Literal["O0", "O1", "O2", "O3"] = "O0"
    """O0: high precision everywhere (FP8 GEMMs by ``gemm.fp8``). O1: FP8 GEMMs, FP8 gradients and their
    reduction, FP16 master weights. O2: O1 and FP8/FP16 moments. O3: O2, ZeRO, and FP8 between
    ranks."""
    recipe: Literal[RECIPE_NAMES] = Field(  # type: ignore[valid-type]
        DEFAULT_RECIPE, description=f"How FP8 scales are chosen; fills ``gemm``. {described()}"
    )
    profile: Literal["default", "paper"] = "default"
    """``paper``: FP8-LM as published: delayed scales (16 steps) for activations and output gradients, one
    scale per tensor everywhere, shared-scale reduction with auto-scaling from 1/sqrt(N), masters rounded to
    nearest, AdamW's steps not bounded."""
    compute: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Type of weights and activations. ``bf16`` keeps FP32 master weights; ``fp64`` is for tests."""
    activations: Literal["compute", "fp8"] = "compute"
    """What backward keeps of the inputs of the blocks' norms and non-linearities: ``fp8`` keeps E4M3 codes
    with a scale for each 16 elements (COAT), and evaluates them again in backward."""
    gemm: GemmConfig
    """FP8 GEMMs of the hidden linears."""
    gradient: GradientConfig
    """Gradient storage and reduction."""
    state: StateConfig
    """Optimizer states."""
    weights: Literal["compute", "fp8"]
    """Weights of the linears that multiply in FP8, between steps: ``compute`` keeps them in the compute
    type and casts them every step; ``fp8`` keeps only the FP8 operand, cast from the master weight."""

    traffic: TrafficConfig
    """What ranks send each other, besides gradients."""
    guard: GuardConfig = GuardConfig()
    """Linears that stand out are named, or leave FP8 for a while."""

    @model_validator(mode="after")
    def _needs_fp8_gemms(self) -> PrecisionConfig:
        if self.gemm.fp8:
            return self
        states = (self.state.master, self.state.exp_avg, self.state.exp_avg_sq)
        for key, off in (
            ("gradient.format", self.gradient.format == "high_precision"),
            ("state", all(state.format == "fp32" for state in states)),
            ("weights", self.weights == "compute"),
            ("traffic", "fp8" not in self.traffic.model_dump().values()),
        ):
            if not off:
                raise contradiction(
                    f"{key} applies to the linears that multiply in FP8, but gemm.fp8 is false; "
                    f"write gemm.fp8: true or level: O0",
                    key,
                    "gemm.fp8",
                )
        return self

    @model_validator(mode="after")
    def _guard(self) -> PrecisionConfig:
        if self.guard.action == "off":
            return self
        if not self.gemm.fp8:
            raise contradiction(
                f"guard.action: {self.guard.action} watches linears that multiply in FP8, but gemm.fp8 is "
                "false; remove it, or write gemm.fp8: true",
                "guard.action",
                "gemm.fp8",
            )
        if self.guard.action == "report":
            return self
        if self.weights == "fp8":
            raise contradiction(
                "guard.action: bf16 multiplies by weights in the compute type, but weights: fp8 keeps none; "
                "write weights: compute, or guard.action: report",
                "guard.action",
                "weights",
            )
        for use, quant in self.gemm.operands().items():
            if quant.scale_source == "delayed":
                raise contradiction(
                    "guard.action: bf16 leaves holes in the amax history of delayed scales, and "
                    f"gemm.{use}.scale_source is delayed; take a recipe whose scales are current, or "
                    "guard.action: report",
                    "guard.action",
                    f"gemm.{use}.scale_source",
                )
        return self

    @model_validator(mode="after")
    def _paper_has_its_own_recipe(self) -> PrecisionConfig:
        if self.profile == "paper" and self.recipe != "current":
            raise contradiction(
                f"profile: paper has delayed scales of its own, but recipe is {self.recipe}; "
                "remove one of the two",
                "profile",
                "recipe",
            )
        return self

    @model_validator(mode="after")
    def _resident_weights(self) -> PrecisionConfig:
        if self.weights == "fp8" and self.gemm.fp8 and self.gemm.keep_w == "bf16":
            raise contradiction(
                "keep_w: bf16 needs weights in the compute type; write weights: compute, or another keep_w",
                "gemm.keep_w",
                "weights",
            )
        return self

    @model_validator(mode="after")
    def _resident_scales(self) -> PrecisionConfig:
        if self.weights != "fp8" or not self.gemm.fp8:
            return self
        uses = {"output.w": self.gemm.output.w}
        if self.gemm.keep_w == "second_copy":
            uses["grad_input.w"] = self.gemm.grad_input.w
        for use, quant in uses.items():
            if quant.granularity != "tensor" or quant.scale_source == "mse":
                key = "scale_source" if quant.scale_source == "mse" else "granularity"
                raise contradiction(
                    "weights: fp8 is written piece by piece with one scale from the amax of the whole, but "
                    f"gemm.{use}.{key} is {getattr(quant, key)}; write weights: compute, or a recipe with "
                    "one scale per tensor",
                    "weights",
                    f"gemm.{use}.{key}",
                )
        return self

    @model_validator(mode="after")
    def _weights_travel_as_they_rest(self) -> PrecisionConfig:
        if self.weights == "compute" and self.traffic.weights == "fp8" and self.gemm.fp8:
            raise contradiction(
                "traffic.weights: fp8 sends the codes of weights that rest in FP8, but weights is compute; "
                "write traffic.weights: compute",
                "traffic.weights",
                "weights",
            )
        return self

    @model_validator(mode="after")
    def _simulated_traffic(self) -> PrecisionConfig:
        if not self.gemm.fp8 or self.gemm.output.x.format != "e2m1":
            return self
        for key in ("activations", "grad_output"):
            if getattr(self.traffic, key) == "fp8":
                raise contradiction(
                    f"traffic.{key}: fp8 sends codes of GEMM operands, but e2m1 operands are simulated and "
                    f"have none; write traffic.{key}: compute",
                    f"traffic.{key}",
                    "gemm.output.x.format",
                )
        return self

    @model_validator(mode="after")
    def _unquantised_traffic(self) -> PrecisionConfig:
        if not self.gemm.fp8 or self.gemm.grad_weight.fp8:
            return self
        for key in ("activations", "grad_output"):
            if getattr(self.traffic, key) == "fp8":
                raise contradiction(
                    f"traffic.{key}: fp8 sends codes, but gemm.grad_weight.fp8: false multiplies unquantised "
                    f"values; write traffic.{key}: compute",
                    f"traffic.{key}",
                    "gemm.grad_weight.fp8",
                )
        return self
