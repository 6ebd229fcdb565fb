"""The ``train`` section: length, batch and execution.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fp8train.config.batch_sizes import BatchSizes
from fp8train.config.limits import BatchSize, Steps, Tokens
from fp8train.config.section import NonNegativeInt, PositiveInt, Section, contradiction


class RampStage(Section):
    """Smaller batches for some steps."""

    steps: Steps = Field(examples=[500])
    """Optimizer steps of this stage."""
    global_batch_size: BatchSize = Field(examples=[16])
    """Samples of each of them, over all ranks."""


class TrainConfig(Section):
    """Length, batch and execution of training."""

    steps: Steps | None = Field(default=None, examples=[1000])
    """Optimizer steps. Exactly one of ``steps`` and ``tokens``."""
    tokens: Tokens | None = None
    """Training tokens; rounded up to whole steps."""
    global_batch_size: BatchSize = Field(examples=[64])
    """Samples per optimizer step over all ranks."""
    batch_size_ramp: tuple[RampStage, ...] = Field(default=(), strict=False)
    """Smaller batches at the start, stage after stage, before ``global_batch_size``."""
    micro_batch_size: BatchSize = Field(examples=[4])
    """Samples per forward pass on one rank."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """``selective`` recomputes norms, activations and attention; ``full`` recomputes whole blocks."""
    gradient_release: bool = False
    """Update parameters bucket by bucket while backward goes on, and keep the gradients of a few buckets only
    (``precision.gradient.bucket_mib``). Needs one micro-batch a step, and no clipping, whose factor needs all
    gradients. Bit-identical; only a step whose gradient stops being finite halfway is taken partly."""
    compile: Literal["off", "block"] = "off"
    """``block``: ``torch.compile`` each decoder block that does not run as fused functions on a GPU."""
    max_skipped_steps: PositiveInt = 20
    """End the run, with exit status 3, when this many steps in a row were skipped."""
    consistency_interval: NonNegativeInt = 1000
    """Compare, every this many steps, the bits of tensors that several ranks hold; 0 = never."""
    eval_interval: NonNegativeInt = 0
    """Evaluate every this many steps and at the end; 0 = never."""
    eval_batches: PositiveInt = 16
    """Global batches per evaluation, always the same ones; fewer if the validation set is smaller."""

    @model_validator(mode="after")
    def _batch(self) -> TrainConfig:
        if self.steps is not None and self.tokens is not None:
            raise contradiction(
                "set exactly one of train.steps and train.tokens; to use the tokens write train.steps=null, "
                "to use the steps train.tokens=null",
                "steps",
                "tokens",
            )
        if self.steps is None and self.tokens is None:
            raise contradiction(
                "set exactly one of train.steps and train.tokens; for example train.steps=1000",
                "steps",
                "tokens",
            )
        sizes = self.batch_sizes.all
        uneven = any(size % self.micro_batch_size for size in sizes)
        if self.batch_size_ramp and (sizes != sorted(set(sizes)) or uneven):
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
