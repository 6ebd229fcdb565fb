"""The ``precision`` section: what is FP8, in which format, and what is not.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fp8train.config.blocks import DIRECTED, Granularity
from fp8train.config.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    contradiction,
)

STATIC_RECIPES = ("mus", "unit_scaling", "umup")
"""Recipes that cast without scales: each is a parametrisation too, of the same name."""


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
    smooth_swiglu: bool = False
    """Scale SwiGLU's output token by token around the down projection, so that an outlier costs its own token
    alone (Smooth-SwiGLU). For recipes with one scale per tensor, or none."""

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

    def _keeps_unquantised_x(self) -> None:
        if self.keep_x != "bf16":
            raise contradiction(
                f"grad_weight.fp8: false multiplies the unquantised input, but keep_x is {self.keep_x}; "
                "write keep_x: bf16",
                "keep_x",
                "grad_weight.fp8",
            )


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

    @model_validator(mode="after")
    def _fits_the_reduction(self) -> Fp8GradientConfig:
        for key, needs in (
            ("sum", "shared_scale"),
            ("mu_criterion", "shared_scale"),
            ("mu_threshold", "shared_scale"),
            ("mu_window", "shared_scale"),
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


class StateFormatConfig(Section):
    """How one optimizer state of the linears that multiply in FP8 is stored."""

    format: Literal["fp32", "bf16", "fp16_scaled", "bf16_remainder", "e4m3", "e5m2"]
    """``fp16_scaled``: FP16 with power-of-two scales; ``bf16_remainder`` (master only): a BF16 weight and
    the 16 bits that it lacks, exact FP32."""
    granularity: Literal["tensor", "block"] = "block"
    """What shares a scale, for ``fp16_scaled`` and FP8: a block of a row, or the tensor (as FP8-LM; takes two
    passes)."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """``stochastic`` keeps updates smaller than half a unit on average; reproducible."""
    expand: bool = False
    """FP8 blocks only: stretch each block's range over the format's (COAT)."""
    sqrt: bool = False
    """Second moment only: store its root, which needs half the exponents."""


class StateConfig(Section):
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
    recipe: Literal[
        "current",
        "fp8_amax",
        "te_current",
        "te_delayed",
        "te_delayed_recent",
        "mse",
        "cscale",
        "rowwise",
        "rowwise_gw_hp",
        "blockwise",
        "mxfp8",
        "nvfp4_simulated",
        "coat_act",
        "mus",
        "unit_scaling",
        "umup",
    ] = "current"
    """How FP8 scales are chosen; fills ``gemm``. ``current``: this tensor's amax, a power of two
    (``fp8_amax``: the same, by its paper's name; ``coat_act``: with ``activations: fp8``). ``te_current``:
    likewise, in FP32. ``te_delayed``: the largest amax of the last 1024 steps; ``te_delayed_recent``: that
    of the last step; both for weights too, in FP32. ``mse``: the power of two of least squared error.
    ``cscale``: constants. ``rowwise``: a scale for each contracted vector, E4M3 everywhere;
    ``rowwise_gw_hp``: weight gradients from unquantised operands. ``blockwise``: 1x128 and 128x128, E4M3
    (DeepSeek-V3). ``mxfp8``: 1x32, E4M3. ``nvfp4_simulated``: FP4 operands, rounded and then multiplied in
    high precision: slower than BF16, for research. All these but ``cscale`` keep weights in the compute
    type. ``mus``, ``unit_scaling``, ``umup``: no scales; they fill ``parametrization`` too, which keeps
    tensors near unit variance."""
    profile: Literal["default", "paper"] = "default"
    """``paper``: FP8-LM as published: delayed scales (16 steps) for activations and output gradients, one
    scale per tensor everywhere, shared-scale reduction with auto-scaling, masters rounded to nearest."""
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
