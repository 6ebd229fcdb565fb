"""What a trainer's parts hand each other, in FP64 and for the logical tensors: the one file that knows how to
look inside.

Ranks add up what each of them has seen with torch's own all-reduce in FP64, not with a path of ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8train.models.build import build_model, initialise
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.store import GradientStore
from fp8train.step.assemble import make_gradient_buckets
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB


class Flat:
    """All parameters one after the other in one FP64 vector.

    Attributes:
        spans: (start, stop) by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes, self.spans, self.size = dict(shapes), {}, 0
        for fqn, shape in shapes.items():
            self.spans[fqn] = self.size, self.size + math.prod(shape)
            self.size += math.prod(shape)

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64)

    def of(self, vector: Tensor, fqn: str) -> Tensor:
        """The parameter's elements, a view of its shape."""
        start, stop = self.spans[fqn]
        return vector[start:stop].view(self.shapes[fqn])

    def unpacked(self, vector: Tensor) -> dict[str, Tensor]:
        return {fqn: self.of(vector, fqn) for fqn in self.shapes}

    def packed(self, tensors: Mapping[str, Tensor]) -> Tensor:
        vector = self.zeros()
        for fqn, tensor in tensors.items():
            self.of(vector, fqn).copy_(tensor)
        return vector


def watch_arrivals(
    store: GradientStore, begin: Callable[[], None], arrived: Callable[[str, Tensor], None]
) -> None:
    """Have ``begin`` called when micro-batches begin to arrive (again), ``arrived`` with each gradient."""
    begin_step, add = store.begin_step, store._add

    def watched_begin(contributions: int, *, launch: bool) -> None:
        begin()
        begin_step(contributions, launch=launch)

    def watched_add(slot: int, gradient: Tensor) -> None:
        arrived(store._slots[slot].fqn, gradient)
        add(slot, gradient)

    store.begin_step, store._add = watched_begin, watched_add  # type: ignore[method-assign]


def watch_launches(store: GradientStore, launched: Callable[[list[str]], None]) -> None:
    """Have ``launched`` called with the names in each bucket whose reduction starts."""

    def watched(bucket: Bucket) -> Callable[[], None]:
        launch, names = bucket.launch, [member.fqn for member in bucket.members]

        def watched_launch() -> None:
            launched(names)
            launch()

        return watched_launch

    for bucket in store.buckets:
        bucket.launch = watched(bucket)  # type: ignore[method-assign]


def grouped_store(trainer: Trainer, group_of: Callable[[str], int]) -> tuple[GradientStore, nn.Module]:
    """A store like the trainer's whose buckets are launched by groups, and the fresh model that it serves."""
    built = build_model(trainer.config, vocab_size=VOCAB, device=trainer.processes.device)
    plan = make_gradient_buckets(trainer.config, trainer.processes, built, contributions=1)
    store = GradientStore(built.model, plan, group_of=group_of)
    connect_linears(built, make_fp8_parts(built, recorder=None), sink_slot=store.sink_slot)
    initialise(built.model, 0)
    return store, built.model


@dataclass
class OnRank:
    """What one rank saw of a step.

    Attributes:
        arrived: this rank's sum over micro-batches at the store's entrance.
        read: what its optimizer read, zero where other ranks own the states; None without an update.
        multiplier: factor with which it did.
    """

    arrived: Tensor
    read: Tensor | None = None
    multiplier: float = math.nan


@dataclass
class Recorder:
    """Fills :attr:`seen` in each step of a trainer.

    Attributes:
        flat: order of the parameters.
        sharded: whether ranks own parts.
    """

    trainer: Trainer
    flat: Flat = field(init=False)
    seen: OnRank = field(init=False)

    def __post_init__(self) -> None:
        trainer = self.trainer
        self.flat = Flat({fqn: spec.global_shape for fqn, spec in trainer.model.specs.items()})
        self.sharded = trainer.sharding is not None
        self.fresh()
        watch_arrivals(trainer.store, self.fresh, self._arrived)
        step = trainer.optimizer.step

        def watched(grad, **settings) -> None:
            self._read(grad, settings["grad_multiplier"])
            step(grad, **settings)

        trainer.optimizer.step = watched  # type: ignore[method-assign]

    def fresh(self) -> None:
        self.seen = OnRank(self.flat.zeros())

    def _arrived(self, fqn: str, gradient: Tensor) -> None:
        self.flat.of(self.seen.arrived, fqn).add_(gradient.detach().double())

    def _read(self, grad, multiplier: Tensor) -> None:
        self.seen.multiplier = float(multiplier)
        self.seen.read = self.flat.zeros()
        for fqn, state in self.trainer.optimizer.states.items():
            values = grad(fqn).chunk(0, state.numel).detach().clone()
            self._own(self.seen.read, fqn).copy_(values.view(state.region.shape))

    def _own(self, vector: Tensor, fqn: str) -> Tensor:
        """The rows of the parameter whose states this rank keeps."""
        whole, region = self.flat.of(vector, fqn), None
        if self.trainer.sharding is not None:
            region = self.trainer.sharding.regions[fqn]
        return whole if region is None else whole[region.offset[0] : region.offset[0] + region.shape[0]]

    def whole(self, owned: Tensor) -> Tensor:
        """The logical vector from what each rank owns of it."""
        return over_ranks(owned) if self.sharded else owned

    def states(self) -> dict[str, Tensor]:
        """Decoded master weights and moments, by role; of the logical tensors, on every rank."""
        optimizer = self.trainer.optimizer
        found = {role: self.flat.zeros() for role in optimizer.states.roles}
        for role, vector in found.items():
            for fqn in optimizer.states:
                self._own(vector, fqn).copy_(optimizer.states.decoded(fqn, role))
        return {role: self.whole(vector) for role, vector in found.items()}

    def bits(self) -> dict[str, str]:
        """A hash of every tensor that survives a step, but for counters of events: a skipped step is one."""
        tensors = self.trainer.state_tensors() | self.trainer.rank_tensors()
        return {
            name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for name, tensor in tensors.items()
            if not name.startswith("scale_state/events/")
        }


def over_ranks(vector: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The reduction over all ranks, in FP64."""
    vector = vector.clone()
    if dist.is_initialized():
        dist.all_reduce(vector, op=op)
    return vector
