"""Bytes that a rank will store, by arithmetic: what :mod:`fp8train.live.describe` counts of a run.

Of every parameter that a rank holds (its pipeline stages, its tensor-parallel part)::

    gradient      all of it, in FP8 blocks or tensors, or in the type in which it is accumulated
    accumulator   of FP8 gradients of several micro-batches
    states        the rows that the rank owns under ZeRO, else all of it, each in its format; of a master that
                  lives in the parameter, what is not there
    weight        the parameter in the compute type, its FP8 copies, or both

Left out, for it is small: what messages are padded with (less than a block for each rank and bucket), and
scale state. Activations and temporaries are not stored between steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fp8train.config.linear_names import linear_paths, weights_in_fp8
from fp8train.config.schema import Config
from fp8train.live.stored_bytes import Footprint, StoredBytes
from fp8train.models.part import ModelPart
from fp8train.models.shapes import Shape, held, local_shape, parameter_shapes
from fp8train.parallel.stages import part_of, plan_stages, stages_of_rank
from fp8train.parallel.zero import Partition, partition
from fp8train.precision.scale_blocks import TWO_LEVELS, block_size, scale_tile
from fp8train.precision.state_formats import StateFormat
from fp8train.update_rules.registry import rule_named
from fp8train.update_rules.rule import MatrixRule

_ITEMSIZE = {"fp8": 1, "bf16": 2, "fp32": 4, "fp64": 8}
_TIED = "embedding.weight"
Counts = dict[str, tuple[int, int]]
"""Bytes of a parameter by what they are for: of values, and of their scales."""


@dataclass(frozen=True)
class Part:
    """A parameter as a rank holds it.

    Attributes:
        fqn: its name.
        whole: its logical shape.
        shape: of this rank's part.
        linear: whether it is the matrix of a hidden linear.
        in_plan: whether that linear multiplies in FP8.
    """

    fqn: str
    whole: Shape
    shape: Shape
    linear: bool
    in_plan: bool

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return math.prod(self.shape)


class RankBytes:
    """What the ranks of a run store.

    Attributes:
        shapes: of all parameters of the model.
        in_plan: names of the matrices in the FP8 plan.
    """

    def __init__(self, config: Config, vocab_size: int, *, dp: int, micro_batches: int) -> None:
        """``dp``: data-parallel ranks; ``micro_batches``: of a step, on a rank."""
        self.config, self._vocab_size, self._dp, self._micro_batches = config, vocab_size, dp, micro_batches
        self.shapes = parameter_shapes(config.model, vocab_size)
        self.in_plan = weights_in_fp8(config)
        self._head_fqn = _TIED if config.model.tie_embeddings else "head.weight"
        self._matrices = frozenset(f"{path}.weight" for path in linear_paths(config.model.num_layers))
        in_fp64 = config.precision.compute == "fp64"
        self._item = _ITEMSIZE[config.precision.compute]
        self._wide = 8 if in_fp64 else 4
        self._accumulated = 8 if in_fp64 else _ITEMSIZE[config.precision.gradient.accumulate]
        rule = rule_named(config.optimizer.name)
        self._roles = rule.roles()
        self._other_roles = rule.others_type.roles() if issubclass(rule, MatrixRule) else rule.roles()

    def largest(self) -> StoredBytes:
        """Count what the rank stores that stores most."""
        pp, pipeline, found = self.config.parallel.pp, self.config.parallel.pipeline, []
        stages = plan_stages(self.config, self._vocab_size)
        for rank in range(pp):
            of_rank = stages_of_rank(pipeline.schedule, pp=pp, per_rank=pipeline.stages, rank=rank)
            found.append(self._of(part_of([stages[index] for index in of_rank])))
        return max(found, key=lambda stored: stored.model.total)

    def _of(self, model_part: ModelPart) -> StoredBytes:
        """Of the rank that owns most among those with this part of the model."""
        parts = list(self._held(model_part))
        owners = self._owners({part.fqn: part.shape for part in parts})
        rank = 0
        if owners is not None:
            loads = owners.loads()
            rank = loads.index(max(loads))
        counts = []
        for part in parts:
            rows = part.shape[0] if owners is None else len(owners.owners[part.fqn][rank])
            weight = (
                self._head(part) if model_part.ends and part.fqn == self._head_fqn else self._weight(part)
            )
            kinds = {"weight": weight, **self._gradient(part, sharded=owners is not None)}
            counts.append((part, {**kinds, **dict(self._states(part, rows))}))
        return StoredBytes(
            plan=self._sum((part, count) for part, count in counts if part.in_plan),
            linears=self._sum((part, count) for part, count in counts if part.linear),
            model=self._sum(counts),
        )

    def _sum(self, counts: Iterable[tuple[Part, Counts]]) -> Footprint:
        """Of some parts together."""
        roles = dict.fromkeys((*self._roles, *self._other_roles), 0)
        values = {"weight": 0, "gradient": 0, "accumulator": 0, **roles}
        scales = {"weight": 0, "gradient": 0, **roles}
        parameters = 0
        for part, count in counts:
            parameters += part.numel
            for kind, (of_values, of_scales) in count.items():
                values[kind] += of_values
                if of_scales:
                    scales[kind] += of_scales
        return Footprint(parameters, values, scales)

    def _held(self, model_part: ModelPart) -> Iterator[Part]:
        tp, tied = self.config.parallel.tp, self.config.model.tie_embeddings
        for fqn, whole in self.shapes.items():
            if held(fqn, model_part, tied=tied):
                shape = local_shape(fqn, whole, tp)
                yield Part(fqn, whole, shape, fqn in self._matrices, fqn in self.in_plan)

    def _owners(self, shapes: dict[str, Shape]) -> Partition | None:
        parallel = self.config.parallel
        replicas = self._dp * parallel.cp
        if parallel.zero == "none" or replicas == 1:
            return None
        in_rows = [_TIED] if self.config.model.tie_embeddings and parallel.pp > 1 and _TIED in shapes else []
        return partition(shapes, replicas, parallel.zero_partition, in_rows=in_rows)

    def _gradient(self, part: Part, *, sharded: bool) -> Counts:
        """What is stored of it, and the accumulator beside that."""
        gradient = self.config.precision.gradient
        fp8 = gradient.fp8
        in_fp8 = gradient.format != "high_precision"
        if in_fp8 and fp8.reduce == "exact":  # integers: INT32 in the plan, INT64 elsewhere
            return {"gradient": (part.numel * (4 if part.in_plan else 8), 0)}
        if not (in_fp8 and part.in_plan):
            return {"gradient": (part.numel * self._accumulated, 0)}
        accumulate = _ITEMSIZE[fp8.accumulate]
        if fp8.reduce == "shared_scale":
            return {"gradient": (part.numel, 4), "accumulator": (part.numel * accumulate, 0)}
        if fp8.reduce != "exchange" and sharded:  # what travels wide is not cast: its owner reads the sum
            return {"gradient": (part.numel * accumulate, 0)}
        block = block_size(part.whole[-1], fp8.block)
        blocks = part.numel // part.shape[-1] * -(-part.shape[-1] // block)
        residual = 2 * blocks * block if fp8.error_feedback else 0
        single = self._micro_batches == 1 and fp8.reduce == "exchange"
        return {
            "gradient": (blocks * block + residual, blocks),
            "accumulator": (residual + (0 if single else blocks * block * accumulate), 0),
        }

    def _states(self, part: Part, rows: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """Bytes of each role for this many rows of a part."""
        shape, formats = (rows, *part.shape[1:]), self.config.state_formats.formats()
        for role in (self._roles if part.linear else self._other_roles) if rows else ():
            fmt = formats[role] if part.in_plan else StateFormat()
            values, scales = _state_bytes(fmt, shape, part.whole[-1], wide=self._wide)
            if role == "master":
                values -= self._in_parameter(part, fmt, math.prod(shape))
            yield role, (values, scales)

    def _in_parameter(self, part: Part, fmt: StateFormat, numel: int) -> int:
        """Bytes of a master of so many elements that are the parameter's own memory."""
        resident = part.in_plan and self.config.precision.weights == "fp8"
        own = {"fp32": self._wide, "bf16_remainder": 2}.get(fmt.format)
        return 0 if resident or own != self._item else numel * self._item

    def _head(self, part: Part) -> tuple[int, int]:
        """The head's weight, and its codes where it multiplies in FP8."""
        own, _ = self._weight(part)
        if self.config.precision.gemm.head != "fp8":
            return own, 0
        rows, columns = part.shape
        return own + (-(-rows // 16) * 16) * (-(-columns // 16) * 16), 4

    def _weight(self, part: Part) -> tuple[int, int]:
        """The parameter in the compute type and its FP8 copies, those that there are."""
        precision, own = self.config.precision, part.numel * self._item
        if not part.in_plan or (precision.gemm.smooth_swiglu == "channel" and ".mlp.down." in part.fqn):
            return own, 0
        gemm = precision.gemm
        specs = [(gemm.output.w, 1), *([(gemm.grad_input.w, 0)] if gemm.keep_w == "second_copy" else [])]
        rows, columns = part.shape
        copies = scales = 0
        for spec, contracted in specs:
            item, count = (self._item if spec.format == "e2m1" else 1), 1
            if spec.granularity not in TWO_LEVELS:
                tile = scale_tile(spec.granularity, contracted)
                count = math.prod(
                    -(-size // (each or size)) for size, each in zip((rows, columns), tile, strict=True)
                )
            copies += (-(-rows // 16) * 16) * (-(-columns // 16) * 16) * item
            scales += 4 * count
        return (copies if precision.weights == "fp8" else own + copies), scales


def _state_bytes(fmt: StateFormat, shape: Shape, whole_row: int, *, wide: int) -> tuple[int, int]:
    """Bytes of one state of this shape, and of its scales; ``wide``: of an element of FP32 (FP64) states."""
    numel = math.prod(shape)
    if not fmt.is_scaled:
        return numel * {"bf16": 2, "bf16_remainder": 4}.get(fmt.format, wide), 0
    codes = numel * (2 if fmt.format == "fp16_scaled" else 1)
    if not fmt.in_blocks:
        return codes, 4
    block = fmt.block_in(shape[-1], whole_row)
    scale = 5 if fmt.expand else 1  # an expanded block has an FP32 amax and a power, else an E8M0 scale
    return codes, numel // shape[-1] * -(-shape[-1] // block) * scale
