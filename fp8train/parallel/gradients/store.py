"""The gradient store: where weight gradients live between backward and the optimizer.

Each parameter owns a slot; slots are grouped into buckets in the order in which backward produces them
(:mod:`fp8train.parallel.gradients` says how a bucket stores and reduces them). Micro-batches add up in the
bucket (the first one overwrites, nothing is zeroed). The store knows how many contributions a parameter gets
per step: when the last one of a bucket is in, the bucket is reduced over the data-parallel ranks while
backward goes on. Buckets are launched in index order on every rank, whatever order they filled in, so
collectives match; a bucket's second half (if its reduction has one) follows the launch of the next bucket, so
there is always one transfer in flight. Too many or too few contributions is an error that names the
parameter.

A step is ``begin_step``, the contributions, ``finish``; if its scales did not fit, ``must_repeat`` and all of
it again; then the optimizer reads; ``commit`` if the step was applied, ``release`` in any case. With
:mod:`~fp8train.parallel.gradients.release` it reads while contributions still come, and buckets share memory.

Two entrances: linears of ours contribute through their sink (:mod:`fp8train.layers.linear`); parameters that
autograd serves (embedding, norms, biases, head) through a post-accumulate hook, which moves ``.grad`` out at
once. A tied weight fires that hook once per backward, after autograd has added its uses. ``.grad`` is None
after each.

The sum over ranks is the gradient of the global batch because every rank divides its loss by the global token
count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8train.comm.collectives import CountedGroup
from fp8train.layers.linear import Linear, SinkSlot
from fp8train.numerics.grad_sink import register_sink
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.bucket_plan import (
    Contributor,
    PlannedBucket,
    fewest_places,
    parts_of,
    plan_buckets,
)
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets
from fp8train.parallel.gradients.grids import GridScales, HeldSums
from fp8train.parallel.gradients.held import GradientReader
from fp8train.parallel.gradients.memory import Memory, SharedMemory
from fp8train.parallel.gradients.receivers import Member
from fp8train.parallel.gradients.release import Release


@dataclass
class _Slot:
    fqn: str
    bucket: int
    member: int
    part: int
    """Of the model, by number in the order of backward."""
    uses: int = 1
    """Contributions of a micro-batch."""
    count: int = 0


@dataclass
class _Bucket:
    storage: Bucket
    slots: list[int]
    pending: int = 0


Update = Callable[[Callable[[str], GradientReader], Sequence[str]], None]
"""Updates these parameters with the gradients that the readers give."""


class GradientStore:
    """Accumulates, reduces and serves the gradients of a model.

    Attributes:
        released: hands buckets to the optimizer during backward; None where they wait for its end.
        lasting: the buckets whose memory is all that gradients take: of those that share some, the largest.
    """

    def __init__(
        self,
        model: nn.Module,
        maker: GradientBuckets,
        *,
        group_of: Callable[[str], int] = lambda _: 0,
        uses: Mapping[str, int] | None = None,
        defer: bool = False,
        parts: CountedGroup | None = None,
        whole: Collection[str] = (),
        update: Update | None = None,
        watched: bool = False,
    ) -> None:
        """Attach a hook to every parameter of ``model`` but the weights of linears, which contribute through
        the place that :meth:`sink_slot` gives them.

        Args:
            model: every parameter that requires a gradient is served.
            maker: kinds and buckets.
            group_of: parameters of different groups share no bucket, and the buckets of a lower number are
                launched first: parts of the model whose backward ends at different times.
            uses: contributions that a micro-batch makes to a parameter, by FQN, where it is not one.
            defer: keep what linears contribute until :meth:`take_deferred`.
            parts: tensor-parallel ranks, which hold other parts of the parameters.
            whole: parameters that each of them holds whole.
            update: release gradients: called with the parameters of a bucket once they may change, in the
                same order on all ranks.
            watched: keep what :meth:`own_sums` returns.
        """
        self._parts, self._whole = parts, frozenset(whole)
        self._owners, self._group, self._scales = maker.owners, maker.replicas, maker.scales
        self._expected, self._launches = 0, True
        self._group_of, self._uses = group_of, dict(uses or {})
        self._deferred: list[tuple[int, Callable[[], Tensor]]] | None = [] if defer else None
        self._slots: list[_Slot] = []
        self._buckets: list[_Bucket] = []
        self._index: dict[str, int] = {}
        self._next_launch = self._next_advance = 0
        self._device, self._norm_is_exact = maker.device, isinstance(maker.scales, GridScales)
        self._masks: dict[tuple[bool, ...], Tensor] = {}
        self._orders: dict[tuple[str, ...], Tensor] = {}
        self._sink = register_sink(self)
        parameters = {fqn: p for fqn, p in reversed(list(model.named_parameters())) if p.requires_grad}
        plan = self._allocate(parameters, maker, shared=update is not None)
        for bucket in self.buckets:
            bucket.watched = watched
        self.released = None if update is None else self._release(plan, maker, update)
        self._attach(model, parameters)

    def _allocate(
        self, parameters: Mapping[str, nn.Parameter], maker: GradientBuckets, *, shared: bool
    ) -> list[PlannedBucket]:
        members = [Member(fqn, tuple(parameter.shape)) for fqn, parameter in parameters.items()]
        plan = plan_buckets(
            [Contributor(m.fqn, m.numel, maker.kind(m.fqn, m.shape), self._group_of(m.fqn)) for m in members],
            maker.capacity,
            places=fewest_places(maker.replicas.size) if shared else None,
        )
        of_bucket = [[members[position] for position in planned.members] for planned in plan]
        order = list(range(len(plan)))
        if shared:  # of those that share memory, the largest is made first
            order.sort(key=lambda number: maker.units(plan[number].kind, of_bucket[number]), reverse=True)
        memories: dict[int, Memory] = {}
        made: dict[int, Bucket] = {}
        self.lasting: list[Bucket] = []
        for number in order:
            place = plan[number].place
            first = place not in memories
            if first:
                memories[place] = (SharedMemory if shared else Memory)(maker.device)
            made[number] = maker.make(plan[number].kind, of_bucket[number], memories[place])
            self.lasting += [made[number]] if first else []
        part = parts_of(parameters)
        for number, planned in enumerate(plan):
            slots = range(len(self._slots), len(self._slots) + len(planned.members))
            self._buckets.append(_Bucket(made[number], list(slots)))
            for slot, position in zip(slots, planned.members, strict=True):
                fqn = members[position].fqn
                self._index[fqn] = slot
                member, uses = slot - slots[0], self._uses.get(fqn, 1)
                self._slots.append(_Slot(fqn, number, member, part[position], uses=uses))
        return plan

    def _release(self, plan: Sequence[PlannedBucket], maker: GradientBuckets, update: Update) -> Release:
        def hand_on(bucket: int) -> None:
            update(self.reader, [self._slots[slot].fqn for slot in self._buckets[bucket].slots])

        return Release(
            plan,
            self.buckets,
            replicas=maker.replicas.size,
            agree=maker.stage if self._owners is not None else self._parts,
            norm_dtype=self._norm_dtype(),
            advance=self._advance,
            hand_on=hand_on,
        )

    def _attach(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        modules = model.named_modules()
        through_sink = {f"{path}.weight" for path, module in modules if isinstance(module, Linear)}
        for fqn, parameter in parameters.items():
            if fqn not in through_sink:
                parameter.register_post_accumulate_grad_hook(self._hook(self._index[fqn]))

    def sink_slot(self, fqn: str) -> SinkSlot:
        """Where a linear contributes the gradients of its weight ``fqn``."""
        slot = self._index[fqn]
        buffer = self._bucket(slot).storage.buffer(self._slots[slot].member)
        return SinkSlot(self._sink, torch.tensor(slot), buffer)

    def _bucket(self, slot: int) -> Bucket:
        return self._buckets[self._slots[slot].bucket].storage

    def _hook(self, slot: int) -> Callable[[Tensor], None]:
        def drain(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            self._add(slot, gradient)

        return drain

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets in launch order."""
        return [bucket.storage for bucket in self._buckets]

    def own_sums(self) -> dict[tuple[str, ...], float]:
        """Return the sums of what this rank contributed to the last step, by the parameters of each bucket in
        the order of backward (:meth:`~fp8train.parallel.gradients.bucket.Storage.own_sum`). Waits for the
        device; empty unless ``watched``."""
        if not self._buckets or not self.buckets[0].watched:
            return {}
        sums = torch.stack([bucket.own_sum for bucket in self.buckets]).tolist()
        members = [tuple(member.fqn for member in bucket.members) for bucket in self.buckets]
        return dict(zip(members, sums, strict=True))

    def own_norms(self) -> dict[str, float]:
        """Euclidean norm of what this rank holds of each parameter's reduced gradient, in the order of
        backward. Waits for the device."""
        released = self.released
        dtype = self._norm_dtype()
        by_bucket = [b.norms(dtype) for b in self.buckets] if released is None else list(released.norms)
        norms = torch.cat(by_bucket).tolist()
        return dict(zip((slot.fqn for slot in self._slots), norms, strict=False))  # released: up to a stop

    def begin_step(self, contributions: int, *, launch: bool = True) -> None:
        """Expect this many contributions (micro-batches) to every parameter; forgets an unfinished step.
        ``launch``: reduce each bucket once it is full; else :meth:`finish` reduces them all."""
        self._expected, self._launches = contributions, launch
        self._next_launch = self._next_advance = 0
        if self._deferred is not None:
            self._deferred.clear()
        for slot in self._slots:
            slot.count = 0
        self._scales.begin_step()  # first: buckets take what holds for this step
        for bucket in self._buckets:
            bucket.pending = len(bucket.slots)
            if self.released is None:  # else each when its turn comes
                bucket.storage.begin()
        if self.released is not None:
            self.released.begin()

    def contribute(self, slot: int, compute: Callable[[], Tensor]) -> None:
        """Add one micro-batch's gradient of the parameter in ``slot``, or keep it for
        :meth:`take_deferred`; see :class:`~fp8train.numerics.grad_sink.GradSink`.

        Raises:
            RuntimeError: more contributions than the step expects.
        """
        if self._deferred is not None:
            self._deferred.append((slot, compute))
            return
        with torch.no_grad():
            self._add(slot, compute())

    def take_deferred(self) -> Callable[[], None]:
        """Take the contributions of linears since the last call, and return the function that computes and
        adds them; call it once. The operands of their GEMMs stay in memory until then."""
        assert self._deferred is not None
        taken = self._deferred.copy()
        self._deferred.clear()

        @torch.no_grad()
        def run() -> None:
            taken.reverse()
            while taken:  # each frees its operands
                slot, compute = taken.pop()
                self._add(slot, compute())

        return run

    @torch.no_grad()
    def _add(self, slot: int, gradient: Tensor) -> None:
        entry = self._slots[slot]
        expected = self._expected * entry.uses
        if entry.count >= expected:
            raise RuntimeError(
                f"gradient of {entry.fqn}: contribution {entry.count + 1} in a step that expects {expected}"
            )
        if self.released is not None and entry.count == 0:
            self.released.before(entry.bucket, entry.part)
        # Into the bucket's accumulator, of the parameter's local shape; ``gradient`` is free after that.
        self._bucket(slot).add(entry.member, gradient, first=entry.count == 0)
        entry.count += 1
        if entry.count == expected:  # the last contribution: the bucket may be complete now
            self._buckets[entry.bucket].pending -= 1
            if self._launches:
                self._launch_ready()

    def _launch_ready(self) -> None:
        # In index order on every rank, so that collectives match, whatever order buckets filled in. A launch
        # posts a bucket's first transfer; then the one before adds what has arrived, and posts its second.
        while self._next_launch < len(self._buckets) and self._buckets[self._next_launch].pending == 0:
            self._buckets[self._next_launch].storage.launch()
            self._advance(self._next_launch)
            self._next_launch += 1
            if self.released is not None:
                self.released.launched(self._next_launch)

    def _advance(self, stop: int) -> None:
        """Post the second transfers of the buckets below this number, where that is to be done."""
        for bucket in self._buckets[self._next_advance : stop]:
            bucket.storage.advance()
        self._next_advance = max(stop, self._next_advance)

    def replayed(self) -> None:
        """Every contribution of the step is in its buffer, put there by a CUDA graph: nobody called."""
        for slot in self._slots:
            slot.count = self._expected * slot.uses
        for bucket in self._buckets:
            bucket.pending = 0

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until every bucket is reduced; where gradients are released, until each is judged.

        Raises:
            RuntimeError: a parameter got fewer contributions than expected.
        """
        missing = [slot for slot in self._slots if slot.count != self._expected * slot.uses]
        if missing:
            listed = ", ".join(
                f"{slot.fqn} ({slot.count} of {self._expected * slot.uses})" for slot in missing[:4]
            )
            raise RuntimeError(f"{len(missing)} parameters lack gradient contributions: {listed}")
        self._launch_ready()  # what begin_step held back
        self._advance(len(self._buckets))  # no later launch did it for the last
        if self.released is not None:
            self.released.judge(len(self._buckets))
        else:
            for bucket in self._buckets:
                bucket.storage.finish()
        self._scales.end_step()

    def must_repeat(self) -> bool:
        """Whether the scales of the step did not fit its gradients: run it again, from :meth:`begin_step`.
        The same on all ranks; after :meth:`finish`."""
        return self._scales.must_repeat()

    @torch.no_grad()
    def commit(self, clip: Tensor | None = None) -> None:
        """Move on what the next step starts from: the optimizer step was applied. Nothing else moves it.

        Args:
            clip: device scalar that its gradients were multiplied by beyond what every step is; None: 1.
        """
        self._scales.commit()
        for bucket in self._buckets:
            bucket.storage.commit(clip)

    def reader(self, fqn: str) -> GradientReader:
        """The parameter's reduced gradient in pieces, for the optimizer; under ZeRO of this rank's rows."""
        slot = self._index[fqn]
        bucket, member = self._bucket(slot), self._slots[slot].member
        if self._owners is None or bucket.scattered:
            return bucket.reader(member)
        shape, rows = bucket.members[member].shape, self._owners.owners[fqn][self._group.rank]
        return bucket.reader(member, offset=rows.start * math.prod(shape[1:]))

    def release(self) -> None:
        """Free what is not kept between steps; the optimizer has read the gradients."""
        for bucket in self._buckets:
            bucket.storage.release()

    def global_norm(self) -> Tensor:
        """Euclidean norm over all parameters: FP64 scalar on the device, no host sync. Sums run in slot
        order, in FP64 on CPUs, of FP64 gradients and of FP8 blocks, else in FP32. Where it is exact, they run
        in the order of names and in FP64 everywhere: slots follow buckets, whose order a rank's part may
        change."""
        if self._norm_is_exact:
            return torch.linalg.vector_norm(self.norms(sorted(self._index)))
        return torch.linalg.vector_norm(self.norms([slot.fqn for slot in self._slots]))

    def norms(self, fqns: Sequence[str]) -> Tensor:
        """Euclidean norm of each of these parameters, zero where this rank holds none of it.

        Returns:
            FP64 [parameters] on the device.
        """
        if self._norm_is_exact:
            return self._exact_norms(fqns)
        if self.released is None:
            dtype = self._norm_dtype()
            by_bucket = [bucket.norms(dtype) for bucket in self.buckets]
        else:
            by_bucket = self.released.norms
        zero = torch.zeros(1, dtype=torch.float64, device=self._device)
        found = torch.cat([*by_bucket, zero])  # by slot, then none
        return self._over_parts(self._over_owners(found[self._order(fqns)], fqns), fqns)

    def _norm_dtype(self) -> torch.dtype:
        """Of the arithmetic of norms."""
        dtypes = [bucket.storage.buffer(0).dtype for bucket in self.buckets]
        wide = self._device.type == "cpu" or torch.float64 in dtypes
        return torch.float64 if wide else torch.float32

    def _order(self, fqns: Sequence[str]) -> Tensor:
        """int64 slots of these parameters, one past the last for those that this rank does not have. On the
        device, made once, as :meth:`_mask`."""
        key = tuple(fqns)
        if key not in self._orders:
            slots = [self._index.get(fqn, len(self._slots)) for fqn in fqns]
            self._orders[key] = torch.tensor(slots, device=self._device)
        return self._orders[key]

    def _exact_norms(self, fqns: Sequence[str]) -> Tensor:
        """From sums of squares that are integers, so that it does not matter which rank holds what."""
        sums = torch.zeros(len(fqns), dtype=torch.int64, device=self._device)
        units = torch.zeros(len(fqns), dtype=torch.float64, device=self._device)
        for i, fqn in enumerate(fqns):
            if fqn in self._index:
                slot = self._slots[self._index[fqn]]
                held = self._bucket(self._index[fqn]).held
                assert isinstance(held, HeldSums), fqn
                sums[i], units[i] = held.square(slot.member)
        if self._owners is not None and self._group.size > 1:
            sums *= self._counted_by_owners(fqns)
            self._group.all_reduce(sums, purpose="norm")()
        if self._parts is not None and self._parts.size > 1:
            sums *= self._counted_by_parts(fqns, self._parts)
            self._parts.all_reduce(sums, purpose="norm")()
        return (sums.double() * units).sqrt()

    def _scattered(self, fqns: Sequence[str]) -> Tensor:
        found = [fqn in self._index and self._bucket(self._index[fqn]).scattered for fqn in fqns]
        return self._mask(found)

    def _mask(self, flags: Sequence[bool]) -> Tensor:
        """On the device. Made once, because that waits for it; norms are of the same parameters each step."""
        key = tuple(flags)
        if key not in self._masks:
            self._masks[key] = torch.tensor(key, device=self._device)
        return self._masks[key]

    def _counted_by_owners(self, fqns: Sequence[str]) -> Tensor:
        """Bool: what this rank counts in a sum over the owners. What is not scattered counts once."""
        return self._scattered(fqns) | (self._group.rank == 0)

    def _counted_by_parts(self, fqns: Sequence[str], parts: CountedGroup) -> Tensor:
        """Bool: likewise in a sum over tensor-parallel ranks, some of whose parameters each holds whole."""
        counted = [fqn not in self._whole or parts.rank == 0 for fqn in fqns]
        return self._mask(counted)

    def _over_owners(self, norms: Tensor, fqns: Sequence[str]) -> Tensor:
        """Norms of whole gradients from those of the rows that each rank owns."""
        if self._owners is None or self._group.size == 1:
            return norms
        squares = norms.square() * self._counted_by_owners(fqns)
        self._group.all_reduce(squares, purpose="norm")()
        return torch.where(self._scattered(fqns), squares.sqrt(), norms)

    def _over_parts(self, norms: Tensor, fqns: Sequence[str]) -> Tensor:
        """Norms of logical tensors from those of this rank's parts."""
        if self._parts is None or self._parts.size == 1:
            return norms
        squares = norms.square() * self._counted_by_parts(fqns, self._parts)
        self._parts.all_reduce(squares, purpose="norm")()
        return squares.sqrt()

    def values(self, fqn: str) -> Tensor:
        """Memory of a parameter's reduced gradient, flat, of this rank's rows: to add other ranks' to it
        after :meth:`finish`. Only for parameters in high precision."""
        slot = self._index[fqn]
        return self._bucket(slot).values(self._slots[slot].member)
