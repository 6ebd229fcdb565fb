"""The ``parallel`` section: which process holds which part of the model and of the batch.

See :mod:`fp8train.config.schema` for how sections work.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fp8train.config.limits import Ranks
from fp8train.config.section import PositiveInt, Section, contradiction


class PipelineConfig(Section):
    """How pipeline stages are cut and scheduled."""

    schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"
    """``1f1b``: one stage a rank. The others give each rank several; ``interleaved_zero_bubble`` and ``zbv``
    fill idle time with weight gradients."""
    stages_per_rank: Ranks | None = None
    """Stages on each rank; default: 1 for ``1f1b``, else 2."""
    layers: list[PositiveInt] | None = None
    """Blocks of each stage, first to last; default: balanced, with embedding and head weighed in."""

    @property
    def stages(self) -> int:
        """Number of stages on each rank."""
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

    dp: Ranks | Literal["auto"] = "auto"
    """Data-parallel ranks: copies of the model, each with its own samples; ``auto``: what is left of the
    world size."""
    tp: Ranks = 1
    """Tensor-parallel ranks: each holds a part of every matrix, and of the sequence between the matrices."""
    cp: Ranks = 1
    """Context-parallel ranks: each holds a part of every sequence; attention exchanges heads for tokens."""
    pp: Ranks = 1
    """Pipeline-parallel ranks: each holds some of the blocks."""
    pipeline: PipelineConfig = PipelineConfig()
    """How blocks become stages."""
    zero: Literal["none", 1, 2, 3] = "none"
    """``1``: optimizer states are split over the data-parallel ranks; gradients are reduced to their owners
    and new weights gathered from them. With ``engine: deepspeed`` also ``2``: gradients are split too, and
    ``3``: so are parameters."""
    zero_partition: Literal["rows", "whole_tensor"] = "rows"
    """``rows``: every matrix is split, balanced at any number of ranks. ``whole_tensor``: tensors go to ranks
    whole, the largest first to the least loaded (FP8-LM, algorithm 1)."""
