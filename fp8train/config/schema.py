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

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from fp8train.config.batch_sizes import BatchSizes
from fp8train.config.layout import layout_problems
from fp8train.config.model_schema import ModelConfig
from fp8train.config.parametrization_schema import ParametrizationConfig
from fp8train.config.precision_schema import STATIC_RECIPES, PrecisionConfig
from fp8train.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    contradiction,
)


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
    kind: Literal["pretrain", "sft"] = "pretrain"
    """``sft``: conversations made by ``fp8train data prepare-sft``; the loss is that of their answers."""
    packing: Literal["best_fit", "none"] | None = None
    """How conversations share sequences (``kind: sft``): ``best_fit`` (default) fills them; ``none``: one
    each, padded, so that none is seen by another."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.prefix is None) == (self.blend is None):
            raise contradiction("set exactly one of data.prefix and data.blend", "prefix", "blend")
        if self.blend is not None and len(self.blend) == 0:
            raise contradiction("blend is empty; list at least one entry {prefix: ..., weight: ...}", "blend")
        if self.packing is not None and self.kind != "sft":
            raise contradiction(
                "packing is about conversations; write kind: sft, or remove packing", "packing", "kind"
            )
        if self.mask_end_of_document and self.kind == "sft":
            raise contradiction(
                "kind: sft has a mask of its own, in which what follows an end of document is no target "
                "unless an answer begins there; remove mask_end_of_document",
                "mask_end_of_document",
                "kind",
            )
        if self.split[0] <= 0:
            raise contradiction("the training share (first number) must be larger than 0", "split")
        if self.valid_prefix is not None and self.split[1] > 0:
            raise contradiction(
                "valid_prefix is set and split keeps a validation share too; "
                "write split: [1, 0, 0] or remove valid_prefix",
                "valid_prefix",
                "split",
            )
        return self


class PipelineConfig(Section):
    """How pipeline stages are cut and scheduled."""

    schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"
    """``1f1b``: one stage a rank. The others give each rank several; ``interleaved_zero_bubble`` and ``zbv``
    fill idle time with weight gradients."""
    stages_per_rank: PositiveInt | None = None
    """Stages on each rank; default: 1 for ``1f1b``, else 2."""
    layers: list[PositiveInt] | None = None
    """Blocks of each stage, first to last; default: balanced, with embedding and head weighed in."""

    @property
    def stages(self) -> int:
        """Stages on each rank."""
        return self.stages_per_rank or (1 if self.schedule == "1f1b" else 2)

    @model_validator(mode="after")
    def _schedule_fits(self) -> PipelineConfig:
        legal = {"1f1b": self.stages == 1, "zbv": self.stages == 2}.get(self.schedule, self.stages >= 2)
        if not legal:
            wanted = {"1f1b": "1", "zbv": "2"}.get(self.schedule, "2 or more")
            raise contradiction(
                f"schedule {self.schedule} has {wanted} stages per rank, not {self.stages}",
                "stages_per_rank",
                "schedule",
            )
        return self


class ParallelConfig(Section):
    """Process layout: world size = dp * pp * cp * tp, tp innermost (its ranks are neighbours)."""

    dp: PositiveInt | Literal["auto"] = "auto"
    """Data-parallel ranks: copies of the model, each with its own samples; ``auto``: what is left of the
    world size."""
    tp: PositiveInt = 1
    """Tensor-parallel ranks: each holds a part of every matrix, and of the sequence between the matrices."""
    cp: PositiveInt = 1
    """Context-parallel ranks: each holds a part of every sequence; attention exchanges heads for tokens."""
    pp: PositiveInt = 1
    """Pipeline-parallel ranks: each holds some of the blocks."""
    pipeline: PipelineConfig = PipelineConfig()
    """How blocks become stages."""
    zero: Literal["none", 1] = "none"
    """``1``: optimizer states are split over the data-parallel ranks; gradients are reduced to their owners
    and new weights gathered from them."""
    zero_partition: Literal["rows", "whole_tensor"] = "rows"
    """``rows``: every matrix is split, balanced at any number of ranks. ``whole_tensor``: tensors go to ranks
    whole, the largest first to the least loaded (FP8-LM, algorithm 1)."""


DecayRule = Literal["lr_times_lambda", "independent", "fully_decoupled"]
MAX_DECAY_PER_STEP = 0.01
"""Share of every weight that a step may remove; more is a λ meant for another decay rule."""


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
    """Decay λ of matrices; 1-D parameters (norms, biases) are not decayed, but for the norm gains of ``mus``.
    0.1, or 1e-4 where ``decay_rule`` does not multiply it by the learning rate."""
    decay_rule: DecayRule = "lr_times_lambda"
    """``lr_times_lambda``: ``w -= lr·λ·w`` (torch's AdamW); ``independent``: ``λ`` times the schedule,
    without the peak rate (``umup``); ``fully_decoupled``: ``w -= λ·w`` at every step (``mus``)."""
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
            raise contradiction(
                "set at most one of schedule.warmup_steps and schedule.warmup_fraction",
                "warmup_steps",
                "warmup_fraction",
            )
        return self


class RampStage(Section):
    """Smaller batches for some steps."""

    steps: PositiveInt = Field(examples=[500])
    """Optimizer steps of this stage."""
    global_batch_size: PositiveInt = Field(examples=[16])
    """Samples of each of them, over all ranks."""


class TrainConfig(Section):
    """Length, batch and execution of training."""

    steps: PositiveInt | None = Field(default=None, examples=[1000])
    """Optimizer steps. Exactly one of ``steps`` and ``tokens``."""
    tokens: PositiveInt | None = None
    """Training tokens; rounded up to whole steps."""
    global_batch_size: PositiveInt = Field(examples=[64])
    """Samples per optimizer step over all ranks."""
    batch_size_ramp: tuple[RampStage, ...] = Field(default=(), strict=False)
    """Smaller batches at the start, stage after stage, before ``global_batch_size``."""
    micro_batch_size: PositiveInt = Field(examples=[4])
    """Samples per forward pass on one rank."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """``selective`` recomputes norms, activations and attention; ``full`` recomputes whole blocks."""
    compile: Literal["off", "block"] = "off"
    """``block``: ``torch.compile`` each decoder block."""
    consistency_interval: NonNegativeInt = 1000
    """Compare, every this many steps, the bits of tensors that several ranks hold; 0 = never."""
    eval_interval: NonNegativeInt = 0
    """Evaluate every this many steps and at the end; 0 = never."""
    eval_batches: PositiveInt = 16
    """Global batches per evaluation, always the same ones; fewer if the validation set is smaller."""

    @model_validator(mode="after")
    def _batch(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise contradiction("set exactly one of train.steps and train.tokens", "steps", "tokens")
        if self.global_batch_size % self.micro_batch_size:
            below = self.global_batch_size // self.micro_batch_size * self.micro_batch_size
            legal = [value for value in (below, below + self.micro_batch_size) if value]
            raise contradiction(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}); nearest legal values: {', '.join(map(str, legal))}",
                "global_batch_size",
                "micro_batch_size",
            )
        sizes = self.batch_sizes.all
        if sizes != sorted(set(sizes)) or any(size % self.micro_batch_size for size in sizes):
            raise contradiction(
                f"batch_size_ramp must grow, up to global_batch_size, in multiples of micro_batch_size "
                f"({self.micro_batch_size}); its sizes are {', '.join(map(str, sizes))}",
                "batch_size_ramp",
                "global_batch_size",
            )
        return self

    @property
    def batch_sizes(self) -> BatchSizes:
        """Samples of each step."""
        ramp = [(stage.steps, stage.global_batch_size) for stage in self.batch_size_ramp]
        return BatchSizes(self.global_batch_size, ramp)


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: NonNegativeInt = 1000
    """Save every this many steps; 0 = only at the end and on request."""
    save_at_end: bool = True
    """Save after the last step."""
    keep_last: PositiveInt = 2
    """Complete checkpoints to retain; older ones are deleted after a newer one is safe."""
    keep_every: NonNegativeInt = 0
    """Also retain, for ever, checkpoints of steps that are multiples of this; 0 = none."""
    keep_best: NonNegativeInt = 0
    """Also retain this many checkpoints with the lowest ``eval/loss``, of those saved at a step that is
    evaluated; needs ``train.eval_interval``."""
    asynchronous: bool = False
    """Write checkpoints while training goes on: it stands still only for a copy to host memory, which takes
    as many bytes as this rank writes (its share of the checkpoint) for the rest of the run."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be saved: ``stop`` ends the run with the error, exit status 2, the last good
    checkpoint kept; ``continue`` warns, records the event ``checkpoint_failed`` and tries again at the next
    interval. A save on request or at the end that fails is an error either way."""
    verify: Literal["full", "size"] = "full"
    """What is checked of a checkpoint before it is loaded: ``full``: SHA-256 of every file; ``size``: sizes,
    and SHA-256 of files up to 1 MiB only, for checkpoints that take too long to read twice."""
    resume: str = "never"
    """``never``: refuse a run directory that already holds a run; ``auto``: continue from its newest complete
    checkpoint, or start fresh; a path: continue from exactly that checkpoint, or fail."""
    accept_changes: tuple[str, ...] = Field(default=(), strict=False)
    """Settings, or sections of them, that a resumed run may have changed although they change what is
    trained: ``[precision, optimizer.lr]``. The layout may always change."""
    reshard: Literal["refuse", "requantise"] = "refuse"
    """What happens where tensor parallelism cuts blocks of optimizer states that share a scale: an error, or
    smaller blocks, for which stored states are rounded once more (and reported)."""
    init_from: str | None = None
    """A checkpoint, or a run or checkpoints directory for its newest, whose weights a new run starts from;
    any layout and formats. A run that ``resume`` continues does not look at it."""
    init_mode: Literal["model", "warm"] = "model"
    """What ``init_from`` takes: ``model``: the weights; ``warm``: the optimizer's moments and its count of
    updates too. Schedule and data start at step 0."""

    @model_validator(mode="after")
    def _one_beginning(self) -> CheckpointConfig:
        if self.init_from is not None and self.resume not in ("never", "auto"):
            raise contradiction(
                f"init_from starts a new run, but resume: {self.resume} continues one; remove one of them, "
                "or write resume: auto, which looks at init_from only where there is nothing to continue",
                "init_from",
                "resume",
            )
        if self.init_from in ("never", "auto"):
            raise contradiction(
                f"init_from: {self.init_from} is no checkpoint; name a step, run or checkpoints directory, "
                "or leave it out",
                "init_from",
            )
        if self.init_from is None and self.init_mode != "model":
            raise contradiction(
                f"init_mode: {self.init_mode} says what to take from init_from, which is not set",
                "init_mode",
                "init_from",
            )
        return self


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
    """Steps between samples of FP8 cast statistics (amax, scale, flushed, saturated, SNR, kurtosis) and of
    the norms of query projections; 0 = never."""


class Config(Section):
    """One run."""

    run: RunConfig = RunConfig()
    """Where and how the run lives."""
    model: ModelConfig
    """The decoder."""
    data: DataConfig
    """Tokenised text."""
    parametrization: ParametrizationConfig = ParametrizationConfig()
    """What depends on width and depth: multipliers, residual weights, learning rates."""
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
    def _accepted_changes_exist(self) -> Config:
        for name in self.checkpoint.accept_changes:
            if not _is_key(name):
                raise contradiction(
                    f"checkpoint.accept_changes: {name} is neither a section nor a key; write for example "
                    "[precision, optimizer.lr]",
                    "checkpoint.accept_changes",
                )
        return self

    @model_validator(mode="after")
    def _parametrization(self) -> Config:
        kind, recipe = self.parametrization.kind, self.precision.recipe
        if kind != "standard" and self.model.tie_embeddings:
            raise contradiction(
                f"parametrization.kind: {kind} gives embedding and output head different multipliers and "
                "learning rates, so they cannot be one tensor; write model.tie_embeddings: false",
                "model.tie_embeddings",
                "parametrization.kind",
            )
        if recipe in STATIC_RECIPES and kind != recipe:
            raise contradiction(
                f"precision.recipe: {recipe} casts without scales, which fits the unit-variance tensors of "
                f"parametrization.kind: {recipe}, but kind is {kind}; remove one of the two, or choose a "
                "recipe that measures its scales, such as current",
                "parametrization.kind",
                "precision.recipe",
            )
        if kind in ("unit_scaling", "umup") and self.train.batch_size_ramp:
            raise contradiction(
                f"parametrization.kind: {kind} has factors that depend on the global batch size, so it "
                "cannot change during a run; remove train.batch_size_ramp",
                "train.batch_size_ramp",
                "parametrization.kind",
            )
        decay = self.optimizer.weight_decay
        if self.optimizer.decay_rule != "lr_times_lambda" and decay > MAX_DECAY_PER_STEP:
            raise contradiction(
                f"optimizer.weight_decay: {decay:g} with decay_rule: {self.optimizer.decay_rule} removes "
                f"{decay:.0%} of every weight at every step; it is no longer multiplied by the learning "
                f"rate: write at most {MAX_DECAY_PER_STEP:g} (typical: 1e-4)",
                "optimizer.weight_decay",
                "optimizer.decay_rule",
            )
        return self

    @model_validator(mode="after")
    def _keep_best(self) -> Config:
        best, every, saved = self.checkpoint.keep_best, self.train.eval_interval, self.checkpoint.interval
        if best and not every:
            raise contradiction(
                f"checkpoint.keep_best: {best} needs evaluations; set train.eval_interval, or write "
                "keep_best: 0",
                "checkpoint.keep_best",
                "train.eval_interval",
            )
        if best and not (saved and math.lcm(every, saved) < self.total_steps):
            raise contradiction(
                f"checkpoint.keep_best: {best}, but no step before the end ({self.total_steps}) is both "
                f"saved (checkpoint.interval: {saved}) and evaluated (train.eval_interval: {every}); make "
                "one a multiple of the other",
                "checkpoint.keep_best",
                "checkpoint.interval",
                "train.eval_interval",
            )
        return self

    @model_validator(mode="after")
    def _smooth_swiglu(self) -> Config:
        gemm = self.precision.gemm
        if gemm.fp8 and gemm.smooth_swiglu != "off" and self.model.activation != "swiglu":
            raise contradiction(
                f"precision.gemm.smooth_swiglu is about SwiGLU, but model.activation is "
                f"{self.model.activation}; remove it",
                "precision.gemm.smooth_swiglu",
                "model.activation",
            )
        if gemm.fp8 and gemm.smooth_swiglu == "channel" and self.precision.weights == "fp8":
            raise contradiction(
                "precision.gemm.smooth_swiglu: channel casts the down projections' weights for every "
                "micro-batch, but precision.weights is fp8; write precision.weights: compute, or "
                "smooth_swiglu: token",
                "precision.gemm.smooth_swiglu",
                "precision.weights",
            )
        return self

    @model_validator(mode="after")
    def _saved_activations(self) -> Config:
        if self.precision.activations == "compute":
            return self
        for key, value, off in (
            ("activation_checkpointing", self.train.activation_checkpointing, "none"),
            ("compile", self.train.compile, "off"),
        ):
            if value != off:
                reason = (
                    "computes again what would be kept" if off == "none" else "decides itself what to keep"
                )
                raise contradiction(
                    "precision.activations: fp8 keeps FP8 inputs of norms and non-linearities, but "
                    f"train.{key}: {value} {reason}; write train.{key}: {off}, or precision.activations: "
                    "compute",
                    "precision.activations",
                    f"train.{key}",
                )
        return self

    @model_validator(mode="after")
    def _guard(self) -> Config:
        guard = self.precision.guard
        if guard.action == "off":
            return self
        if self.logging.cast_statistics_interval == 0:
            raise contradiction(
                f"precision.guard.action: {guard.action} reads cast statistics, but "
                "logging.cast_statistics_interval is 0; give it a number of steps",
                "logging.cast_statistics_interval",
                "precision.guard.action",
            )
        if guard.action == "bf16" and self.train.compile != "off":
            raise contradiction(
                "precision.guard.action: bf16 changes what a block computes while it runs, but train.compile "
                f"is {self.train.compile}; write train.compile: off, or guard.action: report",
                "precision.guard.action",
                "train.compile",
            )
        return self

    @model_validator(mode="after")
    def _state_plan(self) -> Config:
        plan = self.precision.state.plan
        if plan != "default" and self.optimizer.name != "adamw":
            raise contradiction(
                f"precision.state.plan: {plan} is a pair of formats for AdamW's two moments, but "
                f"optimizer.name is {self.optimizer.name}; write precision.state.exp_avg by hand",
                "precision.state.plan",
                "optimizer.name",
            )
        return self

    @model_validator(mode="after")
    def _context(self) -> Config:
        if self.data.seq_length > self.model.max_seq_len:
            raise contradiction(
                f"data.seq_length ({self.data.seq_length}) is longer than "
                f"model.max_seq_len ({self.model.max_seq_len})",
                "data.seq_length",
                "model.max_seq_len",
            )
        for problem in layout_problems(self):
            raise contradiction(problem.message, *problem.keys)
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.train.batch_sizes.steps_for(self.train.tokens, self.data.seq_length)


def _is_key(name: str) -> bool:
    """Whether there is a section or key of this dotted name."""
    section: Any = Config
    for part in name.split("."):
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            return False
        section = fields[part].annotation
    return True


def to_plain(section: BaseModel) -> dict[str, Any]:
    """The section as nested dicts, lists and scalars, ready for YAML or JSON."""
    return section.model_dump(mode="json")
