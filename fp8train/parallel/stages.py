"""How the blocks of a model become pipeline stages, and which stages a rank holds. Arithmetic only.

**Split.** A stage costs what its matrix multiplications cost: a block is 1, the head is its FLOPs over a
block's, the embedding multiplies nothing. Blocks are handed out one by one to the cheapest stage, which
minimises the most expensive one. Between equally cheap stages a block goes to one without the embedding
(which has parameters to store and to update), and then to the latest, because early stages keep the
activations of more micro-batches in flight.

**Placement.** Schedules with a loop give rank r the stages r, r + P, r + 2P, ..; ``zbv`` folds the pipeline
into a V: rank r has r and 2P - 1 - r, so the first and the last stage are on rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fp8train.config.linear_names import linear_dimensions
from fp8train.config.model_schema import ModelConfig
from fp8train.config.schema import Config
from fp8train.models.part import ModelPart
from fp8train.models.shapes import padded_vocab_size


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline: consecutive blocks, and the ends of the model in the first and the last.

    Attributes:
        index: its place, 0-based.
        num_stages: of the whole pipeline.
        layers: global indices of its blocks.
    """

    index: int
    num_stages: int
    layers: tuple[int, ...]

    @property
    def begins(self) -> bool:
        """Whether this stage turns tokens into states: it is the first."""
        return self.index == 0

    @property
    def ends(self) -> bool:
        """Whether this stage turns states into a loss: it is the last."""
        return self.index == self.num_stages - 1

    def owns(self, fqn: str) -> bool:
        """Whether a parameter is used here. A tied embedding is owned by the first stage; the last one uses
        it too."""
        if fqn.startswith("layers."):
            return int(fqn.split(".")[1]) in self.layers
        return self.begins if fqn.startswith(("embedding.", "positions.")) else self.ends


def split_layers(num_layers: int, num_stages: int, *, head_cost: float = 0.0) -> list[int]:
    """Choose the number of blocks of each stage, first to last, so that the stages' costs are even.

    Args:
        num_layers: blocks of the model, at least one per stage.
        num_stages: stages.
        head_cost: FLOPs of the head over those of a block.
    """
    assert 1 <= num_stages <= num_layers
    counts = [1] * num_stages
    extra = [0.0] * (num_stages - 1) + [head_cost]
    for _ in range(num_layers - num_stages):
        # Cost after taking the block; then the stage with the embedding last; then the latest.
        best = min(range(num_stages), key=lambda i: (counts[i] + extra[i], i == 0, -i))
        counts[best] += 1
    return counts


def head_cost(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """FLOPs of the output head over those of a block, per token; causal attention counts half."""
    weights = sum(inputs * outputs for inputs, outputs in linear_dimensions(model).values())
    block = weights + model.num_heads * model.head_dim * seq_length
    return model.hidden_size * padded_vocab_size(vocab_size, model.vocab_multiple) / block


def plan_stages(config: Config, vocab_size: int) -> list[Stage]:
    """All stages of a run, as ``parallel.pipeline`` says or balanced."""
    parallel, model = config.parallel, config.model
    num_stages = parallel.pp * parallel.pipeline.stages
    counts: Sequence[int] | None = parallel.pipeline.layers
    if counts is None:
        cost = head_cost(model, vocab_size, config.data.seq_length)
        counts = split_layers(model.num_layers, num_stages, head_cost=cost)
    ends = [sum(counts[:i]) for i in range(num_stages + 1)]
    return [Stage(i, num_stages, tuple(range(*span))) for i, span in enumerate(pairwise(ends))]


def stages_of_rank(schedule: str, *, pp: int, per_rank: int, rank: int) -> tuple[int, ...]:
    """Indices of the stages that a pipeline rank holds, ascending."""
    if schedule == "zbv":
        return rank, 2 * pp - 1 - rank
    return tuple(rank + i * pp for i in range(per_rank))


def part_of(stages: Sequence[Stage]) -> ModelPart:
    """What a rank with these stages holds of the model."""
    layers = tuple(layer for stage in stages for layer in stage.layers)
    return ModelPart(layers, any(stage.begins for stage in stages), any(stage.ends for stage in stages))
