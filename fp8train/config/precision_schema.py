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
from fp8train.precision.gradients import (
    Accumulate,
    Algorithm,
    Between,
    Criterion,
    Fp8Gradients,
    Gradients,
    Reduction,
    Start,
    Wide,
)
from fp8train.precision.number_formats import format_by_name
from fp8train.precision.operand_cast import Rounding
from fp8train.precision.precision import Precision
from fp8train.precision.scale_blocks import MAX_BLOCK, MIN_BLOCK
from fp8train.precision.state_formats import StateFormat, StateFormats, StateGranularity
from fp8train.precision.traffic import Traffic


class Fp8GradientConfig(ValueSection):
    """Weight gradients of the linears that multiply in FP8, where ``format`` is an FP8 one."""

    accumulate: Accumulate
    """Type in which micro-batches add up before the one cast. ``fp8`` (with ``shared_scale`` only) casts
    after each addition, as MS-AMP does, and loses small contributions."""
    reduce: Reduction
    """Sum over data-parallel ranks. ``exchange``: FP8 on the wire, FP32 in the sum, an error that does not
    grow with the ranks. ``shared_scale``: FP8-LM's sum in FP8 with one scale per tensor and auto-scaling.
    ``exact``: integer sums, the same bits for any number of ranks and micro-batches. ``bf16``/``fp32``:
    reduce in that type, store in FP8."""
    block: Annotated[int, Field(ge=MIN_BLOCK, le=MAX_BLOCK)]
    """Most elements of a row that share a scale; the largest divisor of the row up to this is taken."""
    error_feedback: bool = False
    """``exchange`` only: add what the cast lost to the next step's gradient (2 bytes a parameter)."""
    node_size: PositiveInt | None = None
    """``exchange`` only: ranks that reduce among themselves first (a node's) before anything travels between
    nodes; default: one exchange over all ranks. Must divide the data-parallel ranks."""
    between_nodes: Between = "fp8"
    """Type between nodes, where ``node_size`` is set."""
    sum: Algorithm = "ring"
    """``shared_scale`` only: who adds FP8. ``ring`` and ``tree`` hop by hop on any backend; ``native``:
    NCCL's own FP8 sum (2.24.3 or newer, Hopper)."""
    mu_criterion: Criterion = "count"
    """``shared_scale`` only: what halves the auto-scaling factor: a share of entries at the format's maximum
    (``mu_threshold``), or a single one."""
    mu_threshold: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """``mu_criterion: count`` only: that share (FP8-LM: 0.001 %)."""
    mu_window: PositiveInt = 1000
    """``shared_scale`` only: quiet steps that double the factor."""
    mu_initial: Start = "one_over_ranks"
    """``shared_scale`` only: the factor before the first step, for N data-parallel ranks: 1/N (no sum can
    overflow), 1/sqrt(N) (FP8-LM's own implementation; its paper is silent), or 1."""

    def value(self) -> Fp8Gradients:
        """The value that the gradient store takes."""
        return build(Fp8Gradients, self)


class GradientConfig(ValueSection):
    """Weight gradients between backward and optimizer."""

    accumulate: Wide
    """Storage of high-precision gradients while micro-batches add up."""
    reduce: Wide
    """Their type on the wire of the data-parallel all-reduce."""
    bucket_mib: PositiveFloat = 25.0
    """Gradients are reduced in buckets of about this size, while backward goes on."""
    format: Literal["high_precision", "e4m3", "e5m2"]
    """Storage of the gradients of linears that multiply in FP8; embedding, head, norms and biases always keep
    high precision."""
    fp8: Fp8GradientConfig
    """How FP8 gradients are accumulated and reduced."""

    def value(self) -> Gradients:
        """The value that the gradient store takes."""
        wide = self.format == "high_precision"
        return build(Gradients, self, format=None if wide else format_by_name(self.format))


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

    plan: Literal["default", "coat", "e4m3_e5m2", "lean"] = "default"
    """Fills formats over those of level and profile; AdamW only. ``coat``: both moments in E4M3 blocks with
    expanded ranges (COAT), the master as the level has it. ``e4m3_e5m2``: first moment E4M3, second E5M2,
    master FP16, one scale per tensor each (Fishman et al. 2024): small second moments become zero. ``lean``:
    4 bytes of states: master and first moment as at O2, of the second moment the root in E4M3 blocks, rounded
    stochastically."""
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

    def value(self) -> Traffic:
        """The value that tensor-, pipeline- and ZeRO-parallel ranks take."""
        return Traffic(**{name: kind == "fp8" for name, kind in self})


class PrecisionConfig(ValueSection):
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

    def value(self) -> Precision:
        """All of it as one value, whose rules are between the parts."""
        return build(
            Precision,
            self,
            traffic=self.traffic.value(),
            smooth_swiglu=self.gemm.smooth_swiglu,
            guard_action=self.guard.action,
        )

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
