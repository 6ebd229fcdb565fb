"""The sections of a configuration together, and the small ones.

Rules between sections (:mod:`fp8train.config.layout` and others) read these; the schema, which has the rules,
is made of both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fp8train.config.checkpoint_schema import CheckpointConfig
from fp8train.config.data_schema import DataConfig
from fp8train.config.debug_schema import DebugConfig
from fp8train.config.deepspeed_schema import DeepSpeedConfig
from fp8train.config.kernel_schema import KernelsConfig
from fp8train.config.limits import Threads
from fp8train.config.model_schema import ModelConfig
from fp8train.config.optimizer_schema import OptimizerConfig, ScheduleConfig
from fp8train.config.parallel_schema import ParallelConfig
from fp8train.config.parametrization_schema import ParametrizationConfig
from fp8train.config.precision_schema import PrecisionConfig
from fp8train.config.profile_schema import ProfileConfig
from fp8train.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, contradiction
from fp8train.config.spikes_schema import SpikesConfig
from fp8train.config.train_schema import TrainConfig
from fp8train.config.watchdog_schema import WatchdogConfig
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.registry import rule_named


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
    threads: Threads | None = None
    """CPU threads per rank; default: ``OMP_NUM_THREADS`` where it is set, else visible cores divided by ranks
    on the node. Bit-identity holds at equal threads."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing (``torch.use_deterministic_algorithms``). CPU runs are
    always reproducible; on CUDA this costs speed."""
    cuda_graphs: bool = False
    """Record forward and backward of a step as a CUDA graph, and replay it: one launch instead of thousands,
    for models whose kernels are shorter than a launch. Gradients of data-parallel ranks are then reduced
    after backward, not during it."""
    time_limit_minutes: PositiveFloat | None = None
    """Save and end as ``preempted`` before this process is older than that, while there is still time for one
    more step and a save. Half a minute less than what the machine grants leaves time to end."""
    overwrite: bool = False
    """Delete what an earlier run left in the run directory instead of refusing to start."""

    @model_validator(mode="after")
    def _graphs(self) -> RunConfig:
        if self.cuda_graphs and self.device == "cpu":
            raise contradiction(
                "run.cuda_graphs: true is for CUDA devices, but run.device is cpu; write run.cuda_graphs: "
                "false",
                "cuda_graphs",
                "device",
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


class AllSections(Section):
    """All sections of a run, with what follows from them and without the rules between them
    (:class:`fp8train.config.schema.Config`)."""

    run: RunConfig = RunConfig()
    """Where and how the run lives."""
    engine: Literal["native", "deepspeed"] = "native"
    """Who keeps gradients and optimizer states: this package, or DeepSpeed around its model."""
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
    kernels: KernelsConfig = KernelsConfig()
    """Whose kernels compute what."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """DeepSpeed's settings."""
    optimizer: OptimizerConfig
    """Update rule and its numbers."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""
    train: TrainConfig
    """Length, batch and execution."""
    spikes: SpikesConfig = SpikesConfig()
    """What happens when loss or gradient norm jumps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    logging: LoggingConfig = LoggingConfig()
    """Reporting."""
    profile: ProfileConfig = ProfileConfig()
    """Steps that are recorded for a trace viewer."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """How long the run may stand still."""
    debug: DebugConfig = DebugConfig()
    """Faults on purpose."""

    @property
    def state_formats(self) -> StateFormats:
        """How the optimizer stores the states of a matrix in the FP8 plan."""
        formats = self.precision.state.value()
        if self.checkpoint.reshard == "requantise":
            fitted = {role: replace(fmt, fit=True) for role, fmt in formats.formats().items()}
            formats = replace(formats, **fitted)
        has_second = rule_named(self.optimizer.name).has_second_moment
        return formats if has_second else replace(formats, exp_avg_sq=None)

    @property
    def stored_formats(self) -> StateFormats:
        """How a checkpoint of the run holds those states: DeepSpeed's are decoded for it."""
        formats = self.state_formats
        if self.engine == "native":
            return formats
        return StateFormats(exp_avg_sq=None if formats.exp_avg_sq is None else StateFormat())

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.train.batch_sizes.steps_for(self.train.tokens, self.data.seq_length)
