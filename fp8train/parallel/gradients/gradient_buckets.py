"""Which gradients are stored, reduced and received how: the one place that chooses.

Weights of linears that multiply in FP8 may have FP8 gradients; everything else (embedding, head, norms,
biases, linears outside the plan) keeps high precision, or under ``exact`` a fixed-point grid. Whether a
tensor is quantised is decided by its name in the plan, never by the part of it that a rank happens to hold.

Under ZeRO the owners of rows receive sums. Parameters that tensor-parallel ranks apply to parts of sequences
(norms) are summed over those ranks too, and everyone receives them: they are small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.comm.auto_scale import MuController
from fp8train.comm.collectives import CountedGroup
from fp8train.comm.exchange import Exchange, HierarchicalExchange
from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.formats import dtype_of
from fp8train.parallel.gradients.auto_scales import AutoScales
from fp8train.parallel.gradients.block_storage import BlockStorage, row_blocks
from fp8train.parallel.gradients.bucket import Bucket, Norms, Reduction, Storage
from fp8train.parallel.gradients.exchange_sum import ExchangeSum
from fp8train.parallel.gradients.grids import GridScales
from fp8train.parallel.gradients.integer_storage import FixedPoints, Fp8Points, IntegerStorage
from fp8train.parallel.gradients.integer_sum import CodeSum, IntegerSum
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import (
    Member,
    Owners,
    Places,
    by_place_in_node,
    places_of,
    row_elements,
)
from fp8train.parallel.gradients.recorder import GradientRecorder
from fp8train.parallel.gradients.scales import GradientScales
from fp8train.parallel.gradients.shared_scale_sum import SharedScaleSum
from fp8train.parallel.gradients.tensor_storage import TensorStorage, aligned_elements
from fp8train.parallel.gradients.wide_storage import WideStorage
from fp8train.parallel.gradients.wide_sum import WideSum
from fp8train.parallel.zero import Partition
from fp8train.precision.gradients import Fp8Gradients, Gradients
from fp8train.precision.number_formats import Format
from fp8train.precision.scale_blocks import block_size

PURPOSE = "gradient_fp8_plan"
"""Name of FP8-plan gradients in the byte counters; the others are ``gradient``."""
RESIDUAL_PREFIX = "gradient_residual/"
"""Of the names of residuals of error feedback, in checkpoints."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Groups:
    """The ranks among which gradients travel.

    Attributes:
        all: every data-parallel rank.
        local: those of this node; None for a sum on one level.
        cross: those of all nodes with this one's place in its node.
        parts: tensor-parallel ranks, which hold other parts of the parameters; None for one.
        partial: all of these and the data-parallel ranks, over which gradients of parameters add up that are
            applied to parts of sequences; None without tensor parallelism.
    """

    all: CountedGroup
    local: CountedGroup | None = None
    cross: CountedGroup | None = None
    parts: CountedGroup | None = None
    partial: CountedGroup | None = None

    @property
    def stage(self) -> CountedGroup:
        """Every rank that holds gradients of the same parameters, or parts of them."""
        return self.partial or self.all


class GradientBuckets:
    """Makes the buckets of a gradient store and keeps what they share from step to step.

    Attributes:
        fp8: how FP8 gradients are kept; None if none are.
        scales: scale state: auto-scaling factors of ``shared_scale``, grids of ``exact``.
        owners: under ZeRO, who needs which rows of the sum.
        replicas: the ranks that reduce.
        stage: every rank that holds gradients of the same parameters, or parts of them.
        device: where buffers live.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Gradients,
        *,
        groups: Groups,
        device: torch.device,
        agree: CountedGroup | None = None,
        in_fp8_plan: Collection[str] = (),
        contributions: int = 0,
        recorder: GradientRecorder | None = None,
        unchanged: Mapping[str, int | str | None] | None = None,
        specs: Mapping[str, ParamSpec] | None = None,
        owners: Partition | None = None,
        norms: Norms | None = None,
    ) -> None:
        """Decide how every parameter's gradient is stored, reduced and received, and make the scale state
        that they share.

        Args:
            parameters: everything that will have a gradient; for ``exact`` of the whole model, whatever part
                a rank holds.
            gradients: how to keep and reduce them.
            groups: ranks.
            device: where buffers live.
            agree: ranks whose gradients determine the grids of ``exact``; by default those of ``groups``.
            in_fp8_plan: names whose gradients are FP8.
            contributions: micro-batches of a step; with one, FP8 gradients need no accumulator.
            recorder: takes statistics of casts to FP8.
            unchanged: settings that a checkpoint must have been written with, by key: those that the bits of
                ``exact`` depend on.
            specs: of the parameters, where this rank holds parts of them.
            owners: under ZeRO, who of ``groups.all`` needs which rows of the sum.
            norms: of gradients in high precision, in place of our own.
        """
        self._norms = norms
        self.owners, self.replicas, self.stage = owners, groups.all, groups.stage
        self.fp8 = fp8 = None if gradients.format is None else gradients.fp8
        in_fp64 = any(parameter.dtype == torch.float64 for parameter in parameters.values())
        self._accumulate = torch.float64 if in_fp64 else _DTYPES[gradients.accumulate]
        self._reduce = torch.float64 if in_fp64 else _DTYPES[gradients.reduce]
        self._format, self._bucket_bytes = gradients.format, gradients.bucket_mib * 2**20
        self._specs = specs or {}
        self._groups, self.device = groups, device
        self._in_fp8_plan = frozenset(in_fp8_plan) if fp8 is not None else frozenset()
        self._contributions, self._recorder = contributions, recorder
        self._unchanged = dict(unchanged or {})
        self._with_residual: list[BlockStorage] = []
        self._receivers: Owners | None = None
        if owners is not None:
            self._receivers = Owners(owners, groups.all.rank, range(groups.all.size))
        self.scales = GradientScales()
        if fp8 is not None and fp8.reduce == "shared_scale":
            self.scales = self._auto_scales(parameters, fp8)
        elif fp8 is not None and fp8.reduce == "exact":
            self.scales = GridScales(
                [fqn in self._in_fp8_plan for fqn in parameters],
                [parameter.numel() for parameter in parameters.values()],
                position={fqn: i for i, fqn in enumerate(parameters)},
                micro_batches=contributions * groups.all.size,
                parts=groups.stage.size // groups.all.size,
                group=groups.stage if agree is None else agree,
                device=device,
            )

    def _auto_scales(self, parameters: Mapping[str, Tensor], fp8: Fp8Gradients) -> AutoScales:
        names = [fqn for fqn in parameters if fqn in self._in_fp8_plan]
        controller = MuController(names, world_size=self._groups.all.size, device=self.device, settings=fp8)
        return AutoScales(
            controller,
            position={fqn: i for i, fqn in enumerate(names)},
            numels=[torch.Size(self._global_shape(fqn, parameters[fqn].shape)).numel() for fqn in names],
            counted_over=self._groups.parts if self.owners is None else self._groups.stage,
        )

    def _global_shape(self, fqn: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._specs[fqn].global_shape if fqn in self._specs else shape

    def kind(self, fqn: str, shape: tuple[int, ...]) -> str:
        """The kind of bucket of a parameter: ``wide``, ``partial`` (wide, and to be added over
        tensor-parallel ranks too), ``fp8``, or ``fp8/BLOCK`` (a bucket has one block size)."""
        spec = self._specs.get(fqn)
        if fqn not in self._in_fp8_plan:
            return "partial" if spec is not None and spec.sequence_partial else "wide"
        assert self.fp8 is not None
        if self.fp8.reduce in ("shared_scale", "exact"):
            return "fp8"
        return f"fp8/{block_size(self._global_shape(fqn, shape)[-1], self.fp8.block)}"

    @property
    def _fp8_format(self) -> Format:
        assert self._format is not None
        return self._format

    @property
    def _fp8_accumulate(self) -> torch.dtype:
        """The dtype in which micro-batches of FP8 gradients add up."""
        assert self.fp8 is not None
        accumulate = self.fp8.accumulate
        return dtype_of(self._fp8_format) if accumulate == "fp8" else _DTYPES[accumulate]

    def capacity(self, kind: str) -> int:
        """How many elements a bucket of this kind has, approximately."""
        dtype = self._accumulate
        if isinstance(self.scales, GridScales):
            dtype = Fp8Points.dtype if kind == "fp8" else FixedPoints.dtype
        elif kind.startswith("fp8"):
            dtype = self._fp8_accumulate
        return max(1, int(self._bucket_bytes / dtype.itemsize))

    def units(self, kind: str, members: Sequence[Member]) -> int:
        """How much memory a bucket of this kind takes for these members, to be compared with others' of the
        kind."""
        if kind.startswith("fp8/"):
            return sum(
                member.shape[0] * blocks
                for member, blocks in zip(
                    members, row_blocks(members, int(kind.partition("/")[2])), strict=True
                )
            )
        return sum(map(aligned_elements, members)) if kind == "fp8" else sum(m.numel for m in members)

    def make(self, kind: str, members: Sequence[Member], memory: Memory | None = None) -> Bucket:
        """Make a bucket of this kind for these members: storage, reduction and receiver. ``memory``: of its
        storage; by default its own."""
        memory = memory or Memory(self.device)
        receivers = None if kind == "partial" else self._receivers
        group = self._groups.stage if kind == "partial" else self._groups.all
        fp8 = self.fp8
        if isinstance(self.scales, GridScales):
            assert not memory.shared, "the step may have to be repeated"
            return self._integers(members, receivers, group, in_fp8=kind == "fp8")
        if not kind.startswith("fp8"):
            types = self._accumulate, self._reduce
            return self._wide(members, receivers, group, types, "gradient", memory)
        assert fp8 is not None
        if isinstance(self.scales, AutoScales):
            return self._tensors(members, receivers, self.scales, fp8, memory)
        if fp8.reduce in _DTYPES and self.owners is not None:
            # What travels wide is not cast at all: its owner reads the sum.
            types = self._fp8_accumulate, _DTYPES[fp8.reduce]
            return self._wide(members, receivers, group, types, PURPOSE, memory)
        return self._blocks(members, receivers, int(kind.partition("/")[2]), fp8, memory)

    def _bucket(self, storage: Storage, reduction: Reduction) -> Bucket:
        return Bucket(storage, reduction, norms=self._norms)

    def _wide(
        self,
        members: Sequence[Member],
        receivers: Owners | None,
        group: CountedGroup,
        types: tuple[torch.dtype, torch.dtype],
        purpose: str,
        memory: Memory,
    ) -> Bucket:
        """``types``: in which micro-batches add up, and ranks."""
        places = places_of(receivers, members, row_elements(members))
        storage = WideStorage(places, dtype=types[0], memory=memory)
        return self._bucket(storage, WideSum(storage, group, dtype=types[1], purpose=purpose))

    def _integers(
        self, members: Sequence[Member], receivers: Owners | None, group: CountedGroup, *, in_fp8: bool
    ) -> Bucket:
        assert isinstance(self.scales, GridScales)
        places = self._cheaper(receivers, members, pad_to=group.size)
        points = Fp8Points(self._recorder) if in_fp8 else FixedPoints()
        storage = IntegerStorage(places, points, scales=self.scales, device=self.device)
        codes = in_fp8 and self._contributions == 1 and group.size > 1
        return self._bucket(storage, CodeSum(storage, group) if codes else IntegerSum(storage, group))

    def _tensors(
        self,
        members: Sequence[Member],
        receivers: Owners | None,
        scales: AutoScales,
        fp8: Fp8Gradients,
        memory: Memory,
    ) -> Bucket:
        places = self._cheaper(receivers, members)
        storage = TensorStorage(places, fmt=self._fp8_format, accumulate=self._fp8_accumulate, memory=memory)
        reduction = SharedScaleSum(
            storage,
            self._groups.all,
            scales=scales,
            agree=self._groups.stage,
            algorithm=fp8.sum,
            purpose=PURPOSE,
            counts=places.scattered or self.owners is None or self._groups.all.rank == 0,
            recorder=self._recorder,
        )
        return self._bucket(storage, reduction)

    def _cheaper(self, receivers: Owners | None, members: Sequence[Member], *, pad_to: int = 1) -> Places:
        """Places of elements for owners, or for everyone where that sends less: parts of a message are as
        long as the longest, so that with whole tensors and many owners it may be mostly padding. An
        all-reduce sends its elements twice."""
        places = places_of(receivers, members, row_elements(members), pad_to=pad_to)
        everyone = Places(members, row_elements(members), pad_to=pad_to)
        return places if places.message <= 2 * everyone.total else everyone

    def _blocks(
        self,
        members: Sequence[Member],
        receivers: Owners | None,
        block: int,
        fp8: Fp8Gradients,
        memory: Memory,
    ) -> Bucket:
        group, wide = self._groups.all, _DTYPES.get(fp8.reduce)
        pad_to = group.size if wide is None else 1
        if self.owners is not None and self._groups.local is not None:  # this sum is formed in two levels
            order = by_place_in_node(group.size, self._groups.local.size)
            receivers = Owners(self.owners, group.rank, order)
        places = places_of(receivers, members, row_blocks(members, block), pad_to=pad_to)
        storage = BlockStorage(
            places,
            block=block,
            fmt=self._fp8_format,
            accumulate=None if self._contributions == 1 and wide is None else self._fp8_accumulate,
            error_feedback=fp8.error_feedback,
            recorder=self._recorder,
            own_norms=wide is not None or group.size == 1,
            memory=memory,
        )
        self._with_residual += [storage] if fp8.error_feedback else []
        if wide is not None:
            return self._bucket(storage, WideSum(storage, group, dtype=wide, purpose=PURPOSE))
        return self._bucket(storage, ExchangeSum(storage, self._exchange(fp8)))

    def _exchange(self, fp8: Fp8Gradients) -> Exchange | HierarchicalExchange | None:
        groups = self._groups
        if groups.all.size == 1:
            return None
        if groups.local is None or groups.cross is None:
            return Exchange(groups.all, self._fp8_format, purpose=PURPOSE)
        return HierarchicalExchange(
            groups.local, groups.cross, self._fp8_format, between=fp8.between_nodes, purpose=PURPOSE
        )

    def rank_tensors(self) -> dict[str, Tensor]:
        """What this rank alone knows from step to step: residuals of error feedback."""
        return {
            f"{RESIDUAL_PREFIX}{storage.places.members[0].fqn}": storage.residual
            for storage in self._with_residual
            if storage.residual is not None
        }

    def state_meta(self) -> dict[str, Any]:
        """Which reduction the scale state belongs to, and the settings that must not change."""
        return {"reduction": self.scales.name, "unchanged": self._unchanged}

    def check_meta(
        self, meta: Mapping[str, Any], accepted: Callable[[str], bool] = lambda key: False
    ) -> None:
        """Whether a checkpoint with this host state keeps the promise of ``exact``, if it was ``exact`` too.

        Args:
            meta: the checkpoint's :meth:`state_meta`.
            accepted: keys that the user changes knowingly.

        Raises:
            ValueError: a setting that the bits depend on has another value.
        """
        ours, saved = self.scales.name, meta.get("reduction", "stateless")
        saved_settings = meta.get("unchanged", {}) if ours == saved else self._unchanged
        changed = [
            f"{key}={saved_settings.get(key, 'unknown')} (now {value})"
            for key, value in self._unchanged.items()
            if saved_settings.get(key, "unknown") != value and not accepted(key)
        ]
        if changed:
            raise ValueError(
                f"gradients summed by {ours} have the same bits only if what they depend on stays; restore "
                f"{', '.join(changed)}; the number of data-parallel ranks and pipeline stages may change. To "
                "go on with other bits, name them in `accept_changes`"
            )

    def sent_bytes(self, others: Iterable[CountedGroup] = ()) -> Counter[str]:
        """Bytes this rank has sent since the start, by collective and purpose.

        Args:
            others: groups to count too; one that gradients use is not counted twice.
        """
        ours = (self._groups.all, self._groups.local, self._groups.cross, self._groups.partial)
        groups = {id(group): group for group in (*ours, *others) if group is not None}
        total: Counter[str] = Counter()
        for group in groups.values():
            total.update(group.sent)
        return total
