"""The gradient store: where weight gradients live between backward and the optimizer.

Each parameter owns a slot; slots are grouped into buckets in the order in which backward produces them
(:mod:`fp8train.parallel.buckets` says what a bucket stores and how it is reduced). Micro-batches add up in
the bucket (the first one overwrites, nothing is zeroed). The store knows how many contributions a parameter
gets per
step: when the last one of a bucket is in, the bucket is reduced over the data-parallel ranks while backward
    goes on. Buckets are launched in index order on every rank, whatever order they filled in, so
    collectives match; a bucket's second half (if its reduction has one) follows the launch of the next
    bucket, so there is always one transfer in flight. Too many or too few contributions is an error that
    names the parameter.

Two entrances: linears of ours contribute through their sink (:mod:`fp8train.layers.linear`); parameters that
autograd serves (embedding, norms, biases, head) through a post-accumulate hook, which moves ``.grad`` out at
once. A tied weight fires that hook once per backward, after autograd has added its uses. ``.grad`` is None
after each.

The sum over ranks is the gradient of the global batch because every rank divides its loss by the global token
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fp8train.layers.linear import Linear, SinkSlot
from fp8train.numerics.grad_sink import register_sink
from fp8train.parallel.buckets import Bucket, GradientReader, Member


class BucketMaker(Protocol):
    """Decides the kind of bucket of each parameter, and makes them."""

    def kind(self, fqn: str, shape: tuple[int, ...]) -> str:
        """Parameters of one kind share buckets."""
        ...

    def capacity(self, kind: str) -> int:
        """Elements of a bucket of this kind, approximately."""
        ...

    def make(self, kind: str, members: Sequence[Member]) -> Bucket:
        """A bucket of these members."""
        ...


@dataclass
class _Slot:
    fqn: str
    bucket: int
    member: int
    count: int = 0


@dataclass
class _Bucket:
    storage: Bucket
    slots: list[int]
    pending: int = 0


class GradientStore:
    """Accumulates, reduces and serves the gradients of a model.

    Attributes:
        num_buckets: how many pieces the reduction travels in.
    """

    def __init__(self, model: nn.Module, maker: BucketMaker) -> None:
        """Attach to ``model``: linears get a sink slot, other parameters a hook.

        Args:
            model: every parameter that requires a gradient is served.
            maker: kinds and buckets.
        """
        self._expected = 0
        self._slots: list[_Slot] = []
        self._buckets: list[_Bucket] = []
        self._index: dict[str, int] = {}
        self._next_launch = 0
        self._sink = register_sink(self)
        parameters = {fqn: p for fqn, p in reversed(list(model.named_parameters())) if p.requires_grad}
        self._allocate(parameters, maker)
        self._attach(model, parameters)

    def _allocate(self, parameters: Mapping[str, nn.Parameter], maker: BucketMaker) -> None:
        groups: list[tuple[str, list[int]]] = []
        filled: dict[str, tuple[int, int]] = {}  # kind -> (its open group, elements in it)
        members = [Member(fqn, tuple(parameter.shape)) for fqn, parameter in parameters.items()]
        for position, member in enumerate(members):
            kind = maker.kind(member.fqn, member.shape)
            number, size = filled.get(kind, (-1, 0))
            if number < 0 or size + member.numel > maker.capacity(kind):
                number, size = len(groups), 0
                groups.append((kind, []))
            groups[number][1].append(position)
            filled[kind] = (number, size + member.numel)
        # By their last member: a bucket of norms that is complete only at the end must not hold up the
        # others.
        for bucket, (kind, positions) in enumerate(sorted(groups, key=lambda group: group[1][-1])):
            storage = maker.make(kind, [members[position] for position in positions])
            slots = range(len(self._slots), len(self._slots) + len(positions))
            self._buckets.append(_Bucket(storage, list(slots)))
            for slot, position in zip(slots, positions, strict=True):
                fqn = members[position].fqn
                self._index[fqn] = slot
                self._slots.append(_Slot(fqn, bucket, slot - slots[0]))

    def _attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        through_sink = set()
        for path, module in model.named_modules():
            fqn = f"{path}.weight"
            if isinstance(module, Linear) and fqn in parameters:
                slot = self._index[fqn]
                buffer = self._bucket(slot).buffer(self._slots[slot].member)
                module.sink_slot = SinkSlot(self._sink, torch.tensor(slot), buffer)
                through_sink.add(fqn)
        for fqn, parameter in parameters.items():
            if fqn not in through_sink:
                parameter.register_post_accumulate_grad_hook(self._hook(self._index[fqn]))

    def _bucket(self, slot: int) -> Bucket:
        return self._buckets[self._slots[slot].bucket].storage

    def _hook(self, slot: int) -> Callable[[Tensor], None]:
        def drain(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            self.contribute(slot, lambda: gradient)

        return drain

    @property
    def num_buckets(self) -> int:
        """How many pieces the reduction travels in."""
        return len(self._buckets)

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets in launch order."""
        return [bucket.storage for bucket in self._buckets]

    def begin_step(self, contributions: int) -> None:
        """Expect this many contributions (micro-batches) to every parameter; forgets an unfinished step."""
        self._expected, self._next_launch = contributions, 0
        for slot in self._slots:
            slot.count = 0
        for bucket in self._buckets:
            bucket.pending = len(bucket.slots)

    @torch.no_grad()
    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        """Add one micro-batch's gradient of the parameter in ``slot``; see
        :class:`~fp8train.numerics.grad_sink.GradSink`.

        Raises:
            RuntimeError: more contributions than the step expects.
        """
        entry = self._slots[slot]
        if entry.count >= self._expected:
            raise RuntimeError(
                f"gradient of {entry.fqn}: contribution {entry.count + 1} "
                f"in a step that expects {self._expected}"
            )
        self._bucket(slot).add(entry.member, compute(), first=entry.count == 0)
        entry.count += 1
        if entry.count == self._expected:
            self._buckets[entry.bucket].pending -= 1
            self._launch_ready()

    def _launch_ready(self) -> None:
        while self._next_launch < len(self._buckets) and self._buckets[self._next_launch].pending == 0:
            self._buckets[self._next_launch].storage.launch()
            if self._next_launch:
                self._buckets[self._next_launch - 1].storage.advance()
            self._next_launch += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until every bucket is reduced.

        Raises:
            RuntimeError: a parameter got fewer contributions than expected.
        """
        missing = [slot for slot in self._slots if slot.count != self._expected]
        if missing:
            listed = ", ".join(f"{slot.fqn} ({slot.count} of {self._expected})" for slot in missing[:4])
            raise RuntimeError(f"{len(missing)} parameters lack gradient contributions: {listed}")
        self._buckets[-1].storage.advance()
        for bucket in self._buckets:
            bucket.storage.finish()

    def reader(self, fqn: str) -> GradientReader:
        """The parameter's reduced gradient in pieces, for the optimizer."""
        slot = self._index[fqn]
        return self._bucket(slot).reader(self._slots[slot].member)

    def grad(self, fqn: str) -> Tensor:
        """The parameter's gradient: local sum before :meth:`finish`, global after. Shape of the parameter."""
        slot = self._index[fqn]
        return self._bucket(slot).grad(self._slots[slot].member)

    def global_norm(self) -> Tensor:
        """Euclidean norm over all parameters: FP64 scalar on the device, no host sync. Sums run in slot
        order, in FP64 on CPUs and for FP64 gradients, else in FP32."""
        buffer = self._bucket(0).buffer(0)
        on_cpu = buffer.device.type == "cpu"
        wide = torch.float64 if on_cpu or buffer.dtype == torch.float64 else torch.float32
        norms = [self._bucket(i).norm(slot.member, wide) for i, slot in enumerate(self._slots)]
        return torch.linalg.vector_norm(torch.stack(norms).double())
