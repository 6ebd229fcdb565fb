"""Bytes that a rank will store, by arithmetic: what :mod:`fp8train.live.describe` counts of a run.

Of every parameter that a rank holds (its pipeline stages, its tensor-parallel part)::

    gradient      all of it, in FP8 blocks or tensors, or in the type in which it is accumulated; where
                  gradients are released during backward, of the buckets that do not share memory
    accumulator   of FP8 gradients of several micro-batches
    states        the rows that the rank owns under ZeRO, else all of it, each in its format; of a master that
                  lives in the parameter, what is not there
    weight        the parameter in the compute type, its FP8 copies, or both

States may be in host memory, and then take *slots* on the device.

On a GPU backward reads FP8 weights transposed, a byte more per parameter (:meth:`RankBytes.transposed`).
Left out, for it is small: what messages are padded with (less than a block for each rank and bucket), and
scale state. Activations and temporaries are not stored between steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fp8train.config.linear_names import linear_paths, weights_in_fp8
from fp8train.config.schema import Config
from fp8train.live.deepspeed_bytes import partitioned_bytes
from fp8train.live.stored_bytes import Footprint, StoredBytes
from fp8train.models.part import ModelPart
from fp8train.models.shapes import Shape, held, local_shape, parameter_shapes, split_dim
from fp8train.optim.offload_plan import (
    SLOT_BYTES,
    aligned,
    element_bytes,
    loads,
    pieces,
    slot_sizes,
    unit_of_rows,
)
from fp8train.parallel.gradients.bucket_plan import (
    Contributor,
    PlannedBucket,
    fewest_places,
    plan_buckets,
)
from fp8train.parallel.stages import part_of, plan_stages, stages_of_rank
from fp8train.parallel.zero import Partition, partition
from fp8train.precision.scale_blocks import TWO_LEVELS, block_size, scale_tile
from fp8train.precision.state_formats import StateFormat
from fp8train.update_rules.registry import rule_named
from fp8train.update_rules.rule import MatrixRule

_ITEMSIZE = {"fp8": 1, "bf16": 2, "fp32": 4, "fp64": 8}
_TIED = "embedding.weight"
_PLAIN = StateFormat()
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
        self._state_formats = config.state_formats.formats()
        self._other_roles = rule.others_type.roles() if issubclass(rule, MatrixRule) else rule.roles()

    def largest(self) -> StoredBytes:
        """Count what the rank stores that stores most."""
        if self.config.engine == "deepspeed":
            return partitioned_bytes(
                self.config, self.shapes, linears=self._matrices, planned=self.in_plan, dp=self._dp
            )
        return max(map(self._of, self._model_parts()), key=lambda stored: stored.model.total)

    def transposed(self) -> int:
        """Bytes of FP8 weights in the layout that a GPU's backward reads, beside that of forward; of the rank
        with most. Resident weights have them from the first forward of a step until the optimizer writes the
        next weights, others between steps too."""
        gemm, precision = self.config.precision.gemm, self.config.precision
        written = ("same", "second_copy") if precision.weights == "fp8" else ("same",)
        if not gemm.fp8 or gemm.keep_w not in written or gemm.output.w.format == "e2m1":
            return 0
        return max(
            sum(_padded(part.shape) for part in self._held(model_part) if self._has_copies(part))
            + self._codes_of_head(model_part)
            for model_part in self._model_parts()
        )

    def _model_parts(self) -> Iterator[ModelPart]:
        """What of the model each pipeline rank holds."""
        pp, pipeline = self.config.parallel.pp, self.config.parallel.pipeline
        stages = plan_stages(self.config, self._vocab_size)
        for rank in range(pp):
            of_rank = stages_of_rank(pipeline.schedule, pp=pp, per_rank=pipeline.stages, rank=rank)
            yield part_of([stages[index] for index in of_rank])

    def _of(self, model_part: ModelPart) -> StoredBytes:
        """Of the rank that owns most among those with this part of the model."""
        parts = list(self._held(model_part))
        owners = self._owners({part.fqn: part.shape for part in parts})
        rank = 0
        if owners is not None:
            loads = owners.loads()
            rank = loads.index(max(loads))
        gradients = [self._gradient(part, sharded=owners is not None) for part in parts]
        if self.config.train.gradient_release:
            kept = self._lasting(parts, gradients)
            gradients = [
                found if part.fqn in kept else {} for part, found in zip(parts, gradients, strict=True)
            ]
        rows_of = {
            part.fqn: part.shape[0] if owners is None else len(owners.owners[part.fqn][rank])
            for part in parts
        }
        counts = []
        for part, gradient in zip(parts, gradients, strict=True):
            weight = self._weight(part)
            if part.fqn == self._head_fqn and (codes := self._codes_of_head(model_part)):
                weight = weight[0] + codes, weight[1] + 4
            kinds = {"weight": weight, **gradient}
            counts.append((part, {**kinds, **dict(self._states(part, rows_of[part.fqn]))}))
        return StoredBytes(
            plan=self._sum((part, count) for part, count in counts if part.in_plan),
            linears=self._sum((part, count) for part, count in counts if part.linear),
            model=self._sum(counts),
            slots=self._slots(parts, rows_of, shards=1 if owners is None else owners.ranks),
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
        of_states = sum(values[role] + scales[role] for role in roles)
        return Footprint(parameters, values, scales, of_states if self._offloaded else 0)

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

    def _lasting(self, parts: Sequence[Part], gradients: Sequence[Counts]) -> set[str]:
        """Names in the largest bucket of each place that buckets share."""
        sizes = [sum(map(sum, found.values())) for found in gradients]
        backward = [*reversed(list(zip(parts, sizes, strict=True)))]
        plan = plan_buckets(
            [Contributor(part.fqn, part.numel, self._kind(part)) for part, _ in backward],
            self._capacity,
            places=fewest_places(self._dp * self.config.parallel.cp),
        )
        largest: dict[int, tuple[int, PlannedBucket]] = {}
        for bucket in plan:
            size = sum(backward[position][1] for position in bucket.members)
            if size > largest.get(bucket.place, (0, bucket))[0]:
                largest[bucket.place] = size, bucket
        return {backward[position][0].fqn for _, bucket in largest.values() for position in bucket.members}

    def _kind(self, part: Part) -> str:
        """As :meth:`fp8train.parallel.gradients.gradient_buckets.GradientBuckets.kind`, which it must split
        gradients like."""
        gradient, tp = self.config.precision.gradient, self.config.parallel.tp
        if gradient.format == "high_precision" or not part.in_plan:
            return "partial" if tp > 1 and split_dim(part.fqn) is None else "wide"
        blocks = gradient.fp8.reduce != "shared_scale"
        return f"fp8/{block_size(part.whole[-1], gradient.fp8.block)}" if blocks else "fp8"

    def _capacity(self, kind: str) -> int:
        gradient = self.config.precision.gradient
        item = _ITEMSIZE[gradient.fp8.accumulate] if kind.startswith("fp8") else self._accumulated
        return max(1, int(gradient.bucket_mib * 2**20 / item))

    def _states(self, part: Part, rows: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """Bytes of each role for this many rows of a part."""
        for role, values, scales in self._state_tensors(part, rows):
            yield role, (sum(values), sum(scales))

    def _state_tensors(self, part: Part, rows: int) -> Iterator[tuple[str, list[int], list[int]]]:
        """Bytes of the tensors of each role for this many rows of a part: of values, and of scales."""
        shape = (rows, *part.shape[1:])
        for role, fmt in self._formats(part) if rows else ():
            values, scales = _tensors_of(fmt, shape, part.whole[-1], wide=self._wide)
            if role == "master" and self._in_parameter(part, fmt):
                del values[0]
            yield role, values, scales

    def _formats(self, part: Part) -> list[tuple[str, StateFormat]]:
        """Of each role."""
        roles = self._roles if part.linear else self._other_roles
        return [(role, self._state_formats[role] if part.in_plan else _PLAIN) for role in roles]

    @property
    def _offloaded(self) -> bool:
        """Whether our optimizer keeps states in host memory."""
        return self.config.optimizer.offload == "cpu" and self.config.engine == "native"

    def _slots(self, parts: Sequence[Part], kept: Mapping[str, int], *, shards: int) -> int:
        """Device memory that states visit (:mod:`fp8train.optim.host_states`); ``kept``: rows by name."""
        if not self._offloaded:
            return 0
        named = {part.fqn: part for part in parts}
        sizes = {
            part.fqn: part.numel * sum(element_bytes(fmt) for _, fmt in self._formats(part)) / shards
            for part in parts
        }
        found = []
        for fqns in loads(sizes, SLOT_BYTES):
            nbytes = sum(self._in_slot(named[fqn], kept[fqn]) for fqn in fqns)
            unit = self._unit_of_pieces(named[fqns[0]]) if len(fqns) == 1 and nbytes > SLOT_BYTES else None
            if unit is None:
                found.append(nbytes)
                continue
            (fqn,) = fqns
            cuts = pieces(kept[fqn], nbytes, SLOT_BYTES, unit)
            found += [self._in_slot(named[fqn], last - first) for first, last in cuts]
        return sum(slot_sizes(found))

    def _in_slot(self, part: Part, rows: int) -> int:
        tensors = ((*values, *scales) for _, values, scales in self._state_tensors(part, rows))
        return sum(aligned(nbytes) for of_role in tensors for nbytes in of_role)

    def _unit_of_pieces(self, part: Part) -> int | None:
        """Rows that a piece is a multiple of; None where something spans them all."""
        formats = [fmt for _, fmt in self._formats(part)]
        resident = part.in_plan and self.config.precision.weights == "fp8"
        whole = part.linear and issubclass(rule_named(self.config.optimizer.name), MatrixRule)
        if resident or whole or any(fmt.two_pass for fmt in formats):
            return None
        blocks = [fmt.block_in(part.shape[-1], part.whole[-1]) for fmt in formats]
        return unit_of_rows(math.prod(part.shape[1:]), blocks)

    def _in_parameter(self, part: Part, fmt: StateFormat) -> bool:
        """Whether a master, or its upper half, is the parameter's own memory."""
        resident = part.in_plan and self.config.precision.weights == "fp8"
        own = {"fp32": self._wide, "bf16_remainder": 2}.get(fmt.format)
        return not resident and own == self._item

    def _has_copies(self, part: Part) -> bool:
        """Whether there are FP8 copies of a weight between forwards."""
        in_forward = self.config.precision.gemm.smooth_swiglu == "channel" and ".mlp.down." in part.fqn
        return part.in_plan and not in_forward

    def _codes_of_head(self, model_part: ModelPart) -> int:
        """Bytes of the codes that an FP8 head has beside its weight, without their scale."""
        if self.config.precision.gemm.head != "fp8" or not model_part.ends:
            return 0
        return _padded(local_shape(self._head_fqn, self.shapes[self._head_fqn], self.config.parallel.tp))

    def _weight(self, part: Part) -> tuple[int, int]:
        """The parameter in the compute type and its FP8 copies, those that there are."""
        precision, own = self.config.precision, part.numel * self._item
        if not self._has_copies(part):
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
            copies += _padded(part.shape) * item
            scales += 4 * count
        return (copies if precision.weights == "fp8" else own + copies), scales


def _padded(shape: Shape) -> int:
    """Elements of a matrix whose sizes are padded to multiples of 16."""
    return math.prod(-(-size // 16) * 16 for size in shape)


def _tensors_of(fmt: StateFormat, shape: Shape, whole_row: int, *, wide: int) -> tuple[list[int], list[int]]:
    """Bytes of the tensors of one state of this shape: of values, and of scales; ``wide``: of an element of
    FP32 (FP64) states."""
    numel = math.prod(shape)
    if fmt.format == "bf16_remainder":
        return [numel * 2, numel * 2], []
    if not fmt.is_scaled:
        return [numel * (2 if fmt.format == "bf16" else wide)], []
    codes = [numel * element_bytes(fmt)]
    if not fmt.in_blocks:
        return codes, [4]
    count = numel // shape[-1] * -(-shape[-1] // fmt.block_in(shape[-1], whole_row))
    # An expanded block has an FP32 amax and a power, else an E8M0 scale.
    return codes, [count * 4, count] if fmt.expand else [count]
