"""Optimizer states that live in host memory, and visit the device for a step (``optimizer.offload: cpu``).

Between steps master weights and moments take no device memory, but for a few *slots*. A step goes through
them load by load (:mod:`fp8train.optim.offload_plan`)::

    queue in        k+1 → slot           k+2 → slot           ...
    queue compute   k: update, cast      k+1: update, cast
    queue out       k-1 → host           k → host

Each load always comes to the same slot, so the states of a parameter have one address on the device, and the
pass over them (:mod:`fp8train.optim.optimizer`) is the one that there is without: same kernels, same chunks,
same bits. What waits for what:

* the pass for its load to be there;
* a copy to the host for the pass that wrote its load;
* a copy into a slot for the one that emptied it, or for the pass that read it last. Loads do not change
  slots, so this also is what keeps a load from being fetched before its last version is on the host.

The host waits for nothing but where it reads or writes states itself: checkpoints.

Between visits slots are filled ahead, with what came next in the step before. That hides little of a step that
updates everything at the end, but much where ``train.gradient_release`` updates bucket by bucket: copies then
run beside backward. A guess that turns out wrong is overwritten.

Time is that of the bus. With B bytes of states per parameter, a step of P parameters takes P · B / bandwidth
if both directions run at once. A weight that exists in FP8 only is cast from its master while that is on the
device; when ``train.gradient_release`` asks for that at the end, masters come a second time.

A master that lives in the parameter stays there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fp8train.optim.copy_queues import CopyQueues
from fp8train.optim.offload_plan import SLOT_BYTES, SLOTS, aligned, pieces, slot_sizes, unit_of_rows
from fp8train.optim.parameter_state import ParameterState
from fp8train.optim.state_storage import Take
from fp8train.update_rules.rule import MatrixRule

_HOST_BLOCK = 1 << 30
"""Bytes of a block of host memory: a power of two, as page-locked memory comes in those."""

Rows = tuple[int, int]
"""The first row of a piece, and the one after its last."""


class Make(Protocol):
    """Makes the states of a parameter that a rank keeps, or of some of its rows."""

    def __call__(
        self, fqn: str, rows: Rows | None, *, device: torch.device | None, take: Take | None
    ) -> ParameterState:
        """``device``, ``take``: as of :func:`~fp8train.optim.parameter_state.allocate`."""
        ...


@dataclass(frozen=True)
class Offload:
    """How states are kept in host memory.

    Attributes:
        queues: what copies them.
        slot_bytes: of device memory that a load should fit.
        shards: ranks that share the states of each parameter (ZeRO).
    """

    queues: CopyQueues
    slot_bytes: int = SLOT_BYTES
    shards: int = 1


class Present(NamedTuple):
    """States that are on the device now.

    Attributes:
        fqns: parameters that ranks which agree on amaxes have in front of them together; of one that comes in
            pieces several times.
        states: those that this rank keeps, by a name of their own: the FQN, with rows if it is a piece.
    """

    fqns: tuple[str, ...]
    states: Mapping[str, ParameterState]


@dataclass
class _Memory:
    """Memory that is dealt out in order.

    Attributes:
        allocate: gives uint8 memory.
        left: bytes that will be asked for.
    """

    allocate: Callable[[int], Tensor]
    left: int
    _block: Tensor | None = None
    _used: int = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self._block is None or self._used + aligned(size) > len(self._block):
            self._block, self._used = self.allocate(max(aligned(size), min(self.left, _HOST_BLOCK))), 0
        memory = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used += aligned(size)
        self.left -= aligned(size)
        return memory


@dataclass
class _Measure:
    """Counts the bytes that are asked for."""

    nbytes: int = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.nbytes += aligned(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device="meta")


class _Copy(NamedTuple):
    """Memory of one tensor of a state on both sides, as bytes."""

    fqn: str
    role: str
    host: Tensor
    device: Tensor


class _Planned(NamedTuple):
    """A load that has no memory yet: parameters of all ranks, what of them this rank keeps, its bytes."""

    fqns: tuple[str, ...]
    own: Sequence[tuple[str, Rows | None]]
    nbytes: int


@dataclass
class _Load:
    """What comes to a slot together."""

    fqns: tuple[str, ...]
    slot: int
    states: dict[str, ParameterState] = field(default_factory=dict)
    copies: list[_Copy] = field(default_factory=list)


class _Request(NamedTuple):
    """What of a load comes to its slot: parameters, and roles (None: all)."""

    load: int
    fqns: frozenset[str]
    roles: frozenset[str] | None


class HostStates:
    """The states of a rank in host memory, and slots on the device.

    Attributes:
        home: states of each parameter as the host has them: for descriptions and checkpoints, not for
            arithmetic.
        at_work: states of each parameter or piece of one in their slot; valid while :meth:`visit` shows them.
        slot_bytes: device memory of all slots.
    """

    def __init__(
        self,
        make: Make,
        kept: Collection[str],
        loads: Sequence[tuple[str, ...]],
        offload: Offload,
        device: torch.device,
    ) -> None:
        """Allocate all memory.

        Args:
            make: makes states.
            kept: parameters whose states this rank keeps.
            loads: parameters that come together, also of other ranks.
            offload: how.
            device: where the step runs.
        """
        self._queues, self._make, self._device = offload.queues, make, device
        own = [fqn for fqns in loads for fqn in fqns if fqn in kept]
        memory = _Memory(self._queues.host_memory, sum(self._size(fqn, None) for fqn in own))
        host = torch.device("meta" if device.type == "meta" else "cpu")
        self.home = {fqn: make(fqn, None, device=host, take=memory.take) for fqn in own}
        planned = [load for fqns in loads for load in self._plan(fqns, kept, offload.slot_bytes)]
        sizes = slot_sizes([load.nbytes for load in planned])
        slots = [self._queues.device_memory(size) for size in sizes]
        self.slot_bytes = sum(sizes)
        self._loads = [
            self._fill(load, number % SLOTS, slots[number % SLOTS]) for number, load in enumerate(planned)
        ]
        self.at_work = {name: state for load in self._loads for name, state in load.states.items()}
        made = self._queues.mark("compute")
        self._free, self._ready = [made] * SLOTS, [made] * SLOTS
        self._fetched: list[_Request | None] = [None] * SLOTS
        self._last: _Request | None = None
        self._after: dict[_Request, _Request] = {}

    def _plan(self, fqns: tuple[str, ...], kept: Collection[str], most: int) -> Iterator[_Planned]:
        own = [fqn for fqn in fqns if fqn in kept]
        sizes = [self._size(fqn, None) for fqn in own]
        if len(fqns) == 1 and own and sizes[0] > most:
            (fqn,) = own
            if (unit := _rows_of_pieces(self.home[fqn])) is not None:
                for rows in pieces(self.home[fqn].region.shape[0], sizes[0], most, unit):
                    yield _Planned(fqns, [(fqn, rows)], self._size(fqn, rows))
                return
        yield _Planned(fqns, [(fqn, None) for fqn in own], sum(sizes))

    def _size(self, fqn: str, rows: Rows | None) -> int:
        measure = _Measure()
        self._make(fqn, rows, device=torch.device("meta"), take=measure.take)
        return measure.nbytes

    def _fill(self, planned: _Planned, slot: int, memory: Tensor) -> _Load:
        """Make the states of a load in its slot, and pair their memory with that of the host."""
        load, device = _Load(planned.fqns, slot), _Memory(lambda nbytes: memory, planned.nbytes)
        for fqn, rows in planned.own:
            state = self._make(fqn, rows, device=self._device, take=device.take)
            load.states[fqn if rows is None else f"{fqn}[{rows[0]}:{rows[1]}]"] = state
            for role, storage in state.storages.items():
                homes = self.home[fqn].storages[role].tensors()
                tensors = list(zip(homes.values(), storage.tensors().values(), strict=True))
                if role == "master" and state.bytes_in_parameter:
                    del tensors[0]  # has the same memory on both sides
                for home, at_work in tensors:
                    part = home if rows is None else home[slice(*rows)]
                    load.copies.append(_Copy(fqn, role, _bytes(part), _bytes(at_work)))
        return load

    def visit(
        self, fqns: Collection[str], roles: Collection[str] | None, *, write: bool
    ) -> Iterator[Present]:
        """Bring states to the device, a load at a time; see
        :meth:`fp8train.optim.states.OptimizerStates.visit`."""
        wanted, chosen = frozenset(fqns), None if roles is None else frozenset(roles)
        coming = deque(
            _Request(number, found, chosen)
            for number, load in enumerate(self._loads)
            if (found := wanted.intersection(load.fqns))
        )
        here: deque[_Request] = deque()
        while coming or here:
            while coming and all(self._slot(request) != self._slot(coming[0]) for request in here):
                here.append(coming.popleft())
                self._fetch(here[-1])
            request = here[0]
            load = self._loads[request.load]
            self._queues.wait("compute", self._ready[load.slot])
            states = {name: state for name, state in load.states.items() if state.fqn in wanted}
            yield Present(tuple(fqn for fqn in load.fqns if fqn in wanted), states)
            self._leave(here.popleft(), write=write)
        self._fetch_ahead()

    def _slot(self, request: _Request) -> int:
        return self._loads[request.load].slot

    def _copies(self, request: _Request) -> list[_Copy]:
        return [
            copy
            for copy in self._loads[request.load].copies
            if copy.fqn in request.fqns and (request.roles is None or copy.role in request.roles)
        ]

    def _fetch(self, request: _Request) -> None:
        slot = self._slot(request)
        if self._fetched[slot] == request:
            return
        self._queues.wait("in", self._free[slot])
        copies = self._copies(request)
        self._queues.copy("in", [copy.device for copy in copies], [copy.host for copy in copies])
        self._ready[slot], self._fetched[slot] = self._queues.mark("in"), request

    def _leave(self, request: _Request, *, write: bool) -> None:
        slot, done = self._slot(request), self._queues.mark("compute")
        if write:
            self._queues.wait("out", done)
            copies = self._copies(request)
            self._queues.copy("out", [copy.host for copy in copies], [copy.device for copy in copies])
            done = self._queues.mark("out")
        self._free[slot], self._fetched[slot] = done, None
        if self._last is not None:
            self._after[self._last] = request
        self._last = request

    def _fetch_ahead(self) -> None:
        """Fill the slots with what came next the last time."""
        request, filled = self._last, set[int]()
        while request is not None and (request := self._after.get(request)) is not None:
            if self._slot(request) in filled:
                return
            filled.add(self._slot(request))
            self._fetch(request)

    def settle(self) -> None:
        """Wait until the host's memory has all states, and may be written to."""
        self._queues.settle()
        self._fetched = [None] * SLOTS  # what is in slots may be old by the next visit


def _rows_of_pieces(state: ParameterState) -> int | None:
    """Rows that a piece must be a multiple of; None where something spans all rows: the rule, a scale, or the
    FP8 weight that is cast from the master."""
    spans = any(storage.two_pass for storage in state.storages.values())
    if spans or isinstance(state.rule, MatrixRule) or state.target is not None:
        return None
    row = math.prod(state.region.shape[1:])
    return unit_of_rows(row, (storage.place.block for storage in state.storages.values()))


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: uint8, flat."""
    return tensor.view(-1).view(torch.uint8)
