"""What a run can be told: the frozen pydantic models behind the YAML file.

One class per section, one field per key; the field's description is the documentation (``fp8train config
--schema`` exports it for editors). Values are strict: a number is never read from a string, a bool is never
an int, an unknown key is an error. Fields whose default depends on another field (``model.norm`` on
``model.family``, ``precision.gemm`` on ``precision.level``) are *filled by presets before validation* (see
:mod:`fp8train.config.presets`), so that ``fp8train config`` can tell where each value came from; a validated
:class:`Config` therefore has no holes.

Cross-field rules that need only the file live here, as validators that name both keys. Rules that need the
world size or the data are checked where those are known.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _contradiction(message: str, *keys: str) -> PydanticCustomError:
    """The error a validator raises; ``keys`` are the fields of the section that do not fit together, worst
    first."""
    return PydanticCustomError("contradiction", "{message}", {"message": message, "keys": keys})


class Section(BaseModel):
    """Base of every section: unknown keys refused, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """Where and how the run lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)] = "run"
    """Name of the run; its directory is ``{run.dir}/{run.name}``."""
    dir: str = "runs"
    """Folder that holds run directories."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of weight initialisation and, unless ``data.shuffle_seed`` is set, of the sample order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where a device is visible; ``cuda`` without one is an error."""
    threads: PositiveInt | None = None
    """CPU threads per rank; default: visible cores divided by ranks on the node. Bit-identity holds at equal
    threads."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing (``torch.use_deterministic_algorithms``). CPU runs are
    always reproducible; on CUDA this costs speed."""
    overwrite: bool = False
    """Delete what an earlier run left in the run directory instead of refusing to start."""


class RopeScalingConfig(Section):
    """Llama-3 frequency scaling of rotary positions."""

    factor: PositiveFloat = 8.0
    """Long wavelengths are stretched by this factor."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above ``original_max_seq_len / low_freq_factor`` are stretched fully."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below ``original_max_seq_len / high_freq_factor`` are kept."""
    original_max_seq_len: PositiveInt = 8192
    """Context of the unscaled model."""

    @model_validator(mode="after")
    def _ordered(self) -> RopeScalingConfig:
        if self.high_freq_factor <= self.low_freq_factor:
            raise _contradiction(
                f"high_freq_factor ({self.high_freq_factor:g}) must be larger than low_freq_factor "
                f"({self.low_freq_factor:g})",
                "high_freq_factor",
                "low_freq_factor",
            )
        return self


class ModelConfig(Section):
    """The decoder. ``family`` fills norm, activation, positions, bias and tying; every one of them can be set
    alone."""

    family: Literal["gpt", "llama"] = Field(examples=["llama"])
    """``gpt``: LayerNorm, GELU, biases, learned positions, tied head. ``llama``: RMSNorm, SwiGLU, RoPE, no
    biases, untied."""
    num_layers: PositiveInt = Field(examples=[12])
    """Number of decoder blocks."""
    hidden_size: PositiveInt = Field(examples=[768])
    """Width of the residual stream."""
    num_heads: PositiveInt = Field(examples=[12])
    """Query heads."""
    num_kv_heads: PositiveInt
    """Key/value heads (GQA); default ``num_heads``."""
    head_dim: PositiveInt
    """Width of a head; default ``hidden_size / num_heads``."""
    ffn_hidden_size: PositiveInt
    """Width of the MLP; default ``4 * hidden_size`` (gpt) or ``8/3 * hidden_size`` rounded up to 256
    (llama)."""
    vocab_size: PositiveInt | None = None
    """Vocabulary, before padding; default: the tokenizer's."""
    vocab_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this; padded logits never win."""
    max_seq_len: PositiveInt
    """Longest context; default ``data.seq_length``. Sizes the learned position table."""
    positions: Literal["rope", "learned"]
    """Position information."""
    norm: Literal["layernorm", "rmsnorm"]
    """Normalisation."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    """MLP non-linearity; ``swiglu`` adds the gate projection."""
    bias: bool
    """Biases on linears (and on LayerNorm)."""
    tie_embeddings: bool
    """Share the embedding with the output head."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama-3 rotary scaling; none by default."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of weights at initialisation; projections into the residual stream get
    ``init_std / sqrt(2 * num_layers)``."""

    @model_validator(mode="after")
    def _shapes(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise _contradiction(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
                "num_kv_heads",
                "num_heads",
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise _contradiction(
                f"head_dim ({self.head_dim}) must be even for positions: rope", "head_dim", "positions"
            )
        if self.rope_scaling is not None and self.positions != "rope":
            raise _contradiction(
                f"rope_scaling is set but positions is {self.positions}; "
                "remove rope_scaling or write positions: rope",
                "rope_scaling",
                "positions",
            )
        return self


class BlendEntry(Section):
    """One dataset of a blend."""

    prefix: str = Field(examples=["data/my_corpus"])
    """Path without ``.bin``/``.idx``."""
    weight: PositiveFloat = Field(examples=[1.0])
    """Relative share of samples."""


class DataConfig(Section):
    """Tokenised text: Megatron ``.bin``/``.idx`` pairs made by ``fp8train data prepare``."""

    prefix: str | None = Field(default=None, examples=["data/my_corpus"])
    """Dataset path without ``.bin``/``.idx``. Exactly one of ``prefix`` and ``blend``."""
    blend: tuple[BlendEntry, ...] | None = Field(default=None, strict=False)
    """Several datasets with weights."""
    valid_prefix: str | None = None
    """Separate validation dataset; then the validation share of ``split`` must be 0."""
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        default=(0.98, 0.02, 0.0), strict=False
    )
    """Shares of documents for train, validation and test; normalised to 1."""
    seq_length: PositiveInt = Field(examples=[2048])
    """Tokens a sample predicts; a sample holds one token more."""
    tokenizer: str | None = None
    """Tokenizer file; default: the one recorded beside the dataset. Its hash must match the dataset's."""
    shuffle_seed: NonNegativeInt | None = None
    """Seed of the sample order; default ``run.seed``."""
    mask_end_of_document: bool = False
    """Exclude the prediction made *from* an end-of-document token from the loss."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.prefix is None) == (self.blend is None):
            raise _contradiction("set exactly one of data.prefix and data.blend", "prefix", "blend")
        if self.blend is not None and len(self.blend) == 0:
            raise _contradiction(
                "blend is empty; list at least one entry {prefix: ..., weight: ...}", "blend"
            )
        if self.split[0] <= 0:
            raise _contradiction("the training share (first number) must be larger than 0", "split")
        if self.valid_prefix is not None and self.split[1] > 0:
            raise _contradiction(
                "valid_prefix is set and split keeps a validation share too; "
                "write split: [1, 0, 0] or remove valid_prefix",
                "valid_prefix",
                "split",
            )
        return self


class QuantConfig(Section):
    """How one operand of one GEMM is quantised."""

    format: Literal["e4m3", "e5m2"]
    """FP8 format."""
    granularity: Literal["tensor"] = "tensor"
    """What shares a scale."""
    scale_source: Literal["current", "delayed", "constant"] = "current"
    """Where the scale comes from: ``current`` = this tensor's own amax; ``delayed`` = the amaxes of earlier
    steps; ``constant`` = ``2^constant_exponent``."""
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
    rounding: Literal["nearest"] = "nearest"
    """Rounding of the payload: to nearest, ties to even."""

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
                raise _contradiction(
                    f"{key} belongs to scale_source: {source}, but scale_source is {self.scale_source}",
                    key,
                    "scale_source",
                )
        if self.scale_source == "constant":
            if self.constant_exponent is None:
                raise _contradiction(
                    "scale_source: constant needs constant_exponent; the scale is 2^constant_exponent",
                    "constant_exponent",
                    "scale_source",
                )
            for key, neutral in (("margin", self.margin == 0), ("power_of_two", self.power_of_two)):
                if not neutral:
                    raise _contradiction(
                        f"{key} has no effect with scale_source: constant; remove it", key, "scale_source"
                    )
        return self


def _refuse_two_e5m2(gemm: Section, first: str, second: str) -> None:
    """Hardware multiplies E4M3 by either format, but never E5M2 by E5M2."""
    if getattr(gemm, first).format == "e5m2" and getattr(gemm, second).format == "e5m2":
        raise _contradiction(
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

    @model_validator(mode="after")
    def _kept_operands(self) -> GemmConfig:
        if not self.fp8:
            return self
        for name, keep, forward, backward, backward_use in (
            ("x", self.keep_x, self.output.x, self.grad_weight.x, "grad_weight.x"),
            ("w", self.keep_w, self.output.w, self.grad_input.w, "grad_input.w"),
        ):
            keys = (f"keep_{name}", f"output.{name}", backward_use)
            if keep == "same" and forward != backward:
                raise _contradiction(
                    f"keep_{name}: same reuses the payload of output.{name}, but {backward_use} is set "
                    "differently; make the two equal, or choose requantise, second_copy or bf16",
                    *keys,
                )
            if keep in ("requantise", "second_copy") and forward == backward:
                raise _contradiction(
                    f"keep_{name}: {keep} changes nothing, because output.{name} and {backward_use} are "
                    "equal; write same",
                    *keys,
                )
        return self


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
                raise _contradiction(
                    f"{key} belongs to reduce: {needs}, but reduce is {self.reduce}", key, "reduce"
                )
        if self.accumulate == "fp8" and self.reduce != "shared_scale":
            raise _contradiction(
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

    master: StateFormatConfig
    """Master weights."""
    exp_avg: StateFormatConfig
    """First moment."""
    exp_avg_sq: StateFormatConfig
    """Second moment."""


class PrecisionConfig(Section):
    """Number formats, from the level down to one operand. Later wins: level, recipe, profile, explicit
    fields."""

    level: Literal["O0", "O1", "O2"] = "O0"
    """O0: high precision everywhere (FP8 GEMMs by ``gemm.fp8``). O1: FP8 GEMMs, FP8 gradients and their
    reduction, FP16 master weights. O2: O1 and FP8/FP16 moments. O3 is not built yet."""
    recipe: Literal["current"] = "current"
    """How FP8 scales are chosen; fills ``gemm``."""
    profile: Literal["default", "paper"] = "default"
    """``paper``: FP8-LM as published: delayed scales (16 steps) for activations and output gradients, one
    scale per tensor everywhere, shared-scale reduction with auto-scaling, masters rounded to nearest."""
    compute: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Type of weights and activations. ``bf16`` keeps FP32 master weights; ``fp64`` is for tests."""
    gemm: GemmConfig
    """FP8 GEMMs of the hidden linears."""
    gradient: GradientConfig
    """Gradient storage and reduction."""
    state: StateConfig
    """Optimizer states."""
    weights: Literal["compute", "fp8"]
    """Weights of the linears that multiply in FP8, between steps: ``compute`` keeps them in the compute
    type and casts them every step; ``fp8`` keeps only the FP8 operand, cast from the master weight."""

    @model_validator(mode="after")
    def _needs_fp8_gemms(self) -> PrecisionConfig:
        if self.gemm.fp8:
            return self
        states = (self.state.master, self.state.exp_avg, self.state.exp_avg_sq)
        for key, off in (
            ("gradient.format", self.gradient.format == "high_precision"),
            ("state", all(state.format == "fp32" for state in states)),
            ("weights", self.weights == "compute"),
        ):
            if not off:
                raise _contradiction(
                    f"{key} applies to the linears that multiply in FP8, but gemm.fp8 is false; "
                    f"write gemm.fp8: true or level: O0",
                    key,
                    "gemm.fp8",
                )
        return self

    @model_validator(mode="after")
    def _resident_weights(self) -> PrecisionConfig:
        if self.weights == "fp8" and self.gemm.fp8 and self.gemm.keep_w == "bf16":
            raise _contradiction(
                "keep_w: bf16 needs weights in the compute type; write weights: compute, or another keep_w",
                "gemm.keep_w",
                "weights",
            )
        return self


class ParallelConfig(Section):
    """Process layout."""

    dp: PositiveInt | Literal["auto"] = "auto"
    """Data-parallel ranks; ``auto``: all there are. Must equal the world size."""


class OptimizerConfig(Section):
    """AdamW or Lion, both with decoupled weight decay."""

    name: Literal["adamw", "lion"] = "adamw"
    """Update rule. ``lion`` has no second moment and takes a third to a tenth of AdamW's learning rate."""
    lr: PositiveFloat = Field(examples=[3.0e-4])
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment (AdamW)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices; 1-D parameters (norms, biases) are not decayed."""
    clip_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 = never."""


class ScheduleConfig(Section):
    """Learning rate over steps."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after warm-up; ``wsd``: constant, then a linear decay over the last ``decay_fraction`` of the
    run."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up from 0. At most one of ``warmup_steps`` and ``warmup_fraction``."""
    warmup_fraction: Fraction | None = None
    """Warm-up as a share of all steps."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate divided by the peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps that ``wsd`` decays over."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleConfig:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise _contradiction(
                "set at most one of schedule.warmup_steps and schedule.warmup_fraction",
                "warmup_steps",
                "warmup_fraction",
            )
        return self


class TrainConfig(Section):
    """Length, batch and execution of training."""

    steps: PositiveInt | None = Field(default=None, examples=[1000])
    """Optimizer steps. Exactly one of ``steps`` and ``tokens``."""
    tokens: PositiveInt | None = None
    """Training tokens; rounded up to whole steps."""
    global_batch_size: PositiveInt = Field(examples=[64])
    """Samples per optimizer step over all ranks."""
    micro_batch_size: PositiveInt = Field(examples=[4])
    """Samples per forward pass on one rank."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """``selective`` recomputes norms, activations and attention; ``full`` recomputes whole blocks."""
    compile: Literal["off", "block"] = "off"
    """``block``: ``torch.compile`` each decoder block."""
    eval_interval: NonNegativeInt = 0
    """Evaluate every this many steps and at the end; 0 = never."""
    eval_batches: PositiveInt = 16
    """Global batches per evaluation, always the same ones; fewer if the validation set is smaller."""

    @model_validator(mode="after")
    def _batch(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise _contradiction("set exactly one of train.steps and train.tokens", "steps", "tokens")
        if self.global_batch_size % self.micro_batch_size:
            below = self.global_batch_size // self.micro_batch_size * self.micro_batch_size
            legal = [value for value in (below, below + self.micro_batch_size) if value]
            raise _contradiction(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}); nearest legal values: {', '.join(map(str, legal))}",
                "global_batch_size",
                "micro_batch_size",
            )
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: NonNegativeInt = 1000
    """Save every this many steps; 0 = only at the end and on request."""
    save_at_end: bool = True
    """Save after the last step."""
    keep_last: PositiveInt = 2
    """Complete checkpoints to retain; older ones are deleted after a newer one is safe."""
    resume: str = "never"
    """``never``: refuse a run directory that already holds a run; ``auto``: continue from its newest complete
    checkpoint, or start fresh; a path: continue from exactly that checkpoint, or fail."""


class WandbConfig(Section):
    """Weights & Biases; never stops or slows a run."""

    mode: Literal["off", "offline", "online"] = "off"
    """``offline`` writes locally for a later ``wandb sync``."""
    project: str = "fp8train"
    """Project name."""
    entity: str | None = None
    """Team or user."""


class LoggingConfig(Section):
    """What is reported, and how often."""

    interval: PositiveInt = 10
    """Steps between console lines; ``metrics.jsonl`` gets the same steps."""
    tensorboard: bool = True
    """Write TensorBoard events under ``tb/``."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    cast_statistics_interval: NonNegativeInt = 50
    """Steps between samples of FP8 cast statistics (amax, scale, flushed, saturated, SNR); 0 = never."""


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    """Where and how the run lives."""
    model: ModelConfig
    """The decoder."""
    data: DataConfig
    """Tokenised text."""
    precision: PrecisionConfig
    """Number formats."""
    parallel: ParallelConfig = ParallelConfig()
    """Process layout."""
    optimizer: OptimizerConfig
    """Update rule and its numbers."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    train: TrainConfig
    """Length, batch and execution."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    logging: LoggingConfig = LoggingConfig()
    """Reporting."""

    @model_validator(mode="after")
    def _context(self) -> Config:
        if self.data.seq_length > self.model.max_seq_len:
            raise _contradiction(
                f"data.seq_length ({self.data.seq_length}) is longer than "
                f"model.max_seq_len ({self.model.max_seq_len})",
                "data.seq_length",
                "model.max_seq_len",
            )
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // (self.train.global_batch_size * self.data.seq_length))


def to_plain(section: BaseModel) -> dict[str, Any]:
    """The section as nested dicts, lists and scalars, ready for YAML or JSON."""
    return section.model_dump(mode="json")
