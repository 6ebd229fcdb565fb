"""States as a checkpoint holds them: in which format, and how to turn one into another.

A stored state says itself how it is encoded: by the suffixes of its tensors, their dtypes, and how many
scales a row has (:func:`stored_format`). So a checkpoint of any level, plan or list of excluded linears is
read without building the model that wrote it; only a root looks like the state itself, and must be told.

A state whose format is the run's own is copied, bit by bit. Any other is read in its own format, this
rank's part alone, and recast run by run of rows: decoded to FP32 and encoded to nearest, as a step of the
optimizer would (:func:`recast`). At most one stored state and a few chunks are in memory besides what
trains. Where the part cuts blocks of the *stored* state, the whole blocks are read: decoding is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.cast import amax_of
from fp8train.numerics.formats import dtype_of
from fp8train.optim.make_storage import make_storage
from fp8train.optim.optimizer import CHUNK
from fp8train.optim.parameter_state import ParameterState, Region, logical_tensors, place_of
from fp8train.optim.states import OptimizerStates
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.scale_blocks import MAX_BLOCK
from fp8train.precision.state_formats import StateFormat, StateName

Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Global shape and dtype of stored tensors by name."""

Part = tuple[Tensor, tuple[int, ...], tuple[int, ...]]
"""A rectangle to fill: memory, global shape, offset."""

Read = Callable[[Mapping[str, Part]], None]
"""Fills rectangles of stored tensors in place."""

_PLAIN: dict[torch.dtype, StateName] = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
}
_CODES: dict[torch.dtype, StateName] = {
    torch.float16: "fp16_scaled",
    dtype_of(E4M3): "e4m3",
    dtype_of(E5M2): "e5m2",
}
_SUFFIXES = ("", ".payload", ".weight", ".scale", ".scale_inv", ".amax", ".power", ".remainder")


def state_names(described: Described, role: str, fqn: str) -> list[str]:
    """Names of the stored tensors that make up one state, of those in ``described``."""
    return [name for suffix in _SUFFIXES if (name := f"{role}/{fqn}{suffix}") in described]


def stored_format(
    described: Described, role: str, fqn: str, *, root: bool
) -> tuple[StateFormat, tuple[int, ...]] | None:
    """The format of one state, rounding aside, and the parameter's global shape; None if it is not there, or
    not in a format of ours.

    Args:
        described: everything stored.
        role: ``master``, ``exp_avg`` or ``exp_avg_sq``.
        fqn: of the parameter.
        root: whether states of this role that lose bits are stored as their root.
    """
    name = f"{role}/{fqn}"
    if name in described:
        shape, dtype = described[name]
        fmt = StateFormat(_PLAIN[dtype]) if dtype in _PLAIN else None
    elif f"{name}.remainder" in described:
        shape, _ = described[f"{name}.remainder"]
        fmt = StateFormat("bf16_remainder")
    elif f"{name}.payload" in described:
        shape, dtype = described[f"{name}.payload"]
        fmt = _scaled(described, name, shape, _CODES[dtype]) if dtype in _CODES else None
    else:
        return None
    return None if fmt is None else (replace(fmt, sqrt=root and not fmt.is_exact), shape)


def _scaled(described: Described, name: str, shape: tuple[int, ...], codes: StateName) -> StateFormat | None:
    """A format of codes: one scale, or how many to a row."""
    for suffix in (".scale", ".amax"):
        if f"{name}{suffix}" in described:
            scales, _ = described[f"{name}{suffix}"]
            if len(scales) != len(shape) or not shape or scales[-1] < 1:
                return None
            # A row is whole blocks, or ends in a short one: then it had no divisor, and they are the largest.
            block, short = divmod(shape[-1], scales[-1])
            block = MAX_BLOCK if short else block
            return None if block > MAX_BLOCK else StateFormat(codes, block=block, expand=suffix == ".amax")
    return StateFormat(codes, granularity="tensor")


def with_stored_blocks(fmt: StateFormat, described: Described, role: str, fqn: str) -> StateFormat:
    """``fmt``, the format of one state of the run that wrote a checkpoint, with the blocks that it has there:
    a cut may have left smaller ones than whole rows have (``fit`` of a format)."""
    if not fmt.in_blocks:
        return fmt
    found = stored_format(described, role, fqn, root=fmt.sqrt)
    return fmt if found is None else replace(fmt, block=found[0].block)


@dataclass(frozen=True)
class Recast:
    """One state of one parameter that is stored in another format than the run's.

    Attributes:
        fqn: the parameter.
        role: the state.
        stored: format in the checkpoint.
        now: format in the run.
    """

    fqn: str
    role: str
    stored: StateFormat
    now: StateFormat

    @property
    def only_blocks_differ(self) -> bool:
        """Whether the states would be rounded again merely because a cut changed their blocks."""
        in_blocks = self.stored.in_blocks and self.now.in_blocks
        return in_blocks and replace(self.stored, block=self.now.block) == self.now

    def __str__(self) -> str:
        sizes = self.only_blocks_differ
        return " -> ".join(
            str(fmt) if sizes else str(fmt).replace(f"block{fmt.block}", "blocks")
            for fmt in (self.stored, self.now)
        )


@dataclass(frozen=True)
class StatesToLoad:
    """What becomes of each state that this rank keeps.

    Attributes:
        equal: names of stored tensors that are copied.
        recasts: states that change format.
        problems: states that are absent or have another shape.
    """

    equal: list[str]
    recasts: list[Recast]
    problems: list[str]


def plan_load(
    states: OptimizerStates, described: Described, *, roles: tuple[str, ...], roots: Mapping[str, bool]
) -> StatesToLoad:
    """Compare what a checkpoint holds with what ``states`` are.

    Args:
        states: of the run.
        described: everything stored.
        roles: states to load.
        roots: per role, see :func:`stored_format`.
    """
    ours = {name: (shape, tensor.dtype) for name, (tensor, shape, _) in states.logical_tensors().items()}
    plan = StatesToLoad([], [], [])
    for fqn, state in states.items():
        for role in (role for role in roles if role in state.storages):
            own = stored_format(ours, role, fqn, root=state.formats[role].sqrt)
            assert own is not None
            found = stored_format(described, role, fqn, root=roots.get(role, False))
            if found is None:
                plan.problems.append(f"{role}/{fqn}: not in the checkpoint")
            elif found[1] != state.spec.global_shape:
                plan.problems.append(
                    f"{role}/{fqn}: checkpoint has {found[1]}, run has {state.spec.global_shape}"
                )
            elif found[0] == own[0]:
                plan.equal.extend(state_names(ours, role, fqn))
            else:
                plan.recasts.append(Recast(fqn, role, found[0], own[0]))
    return plan


class StoredState:
    """A region of one stored state, decoded by rows."""

    def __init__(self, role: str, spec: ParamSpec, region: Region, fmt: StateFormat, read: Read) -> None:
        """Read the state, in its own format, to the CPU.

        Args:
            role: which state.
            spec: of the parameter.
            region: what of it.
            fmt: its format.
            read: reads the checkpoint.
        """
        wide = self._widened(spec, region, fmt)
        self._skip, self._row = region.offset[-1] - wide.offset[-1], region.shape[-1]
        self._storage = make_storage(fmt, place_of(spec, wide, fmt, torch.device("cpu")), wide=torch.float32)
        read({name: part for name, *part in logical_tensors(role, spec, wide, self._storage)})  # type: ignore[misc]

    @staticmethod
    def _widened(spec: ParamSpec, region: Region, fmt: StateFormat) -> Region:
        """The region, out to whole blocks of its rows."""
        if not fmt.in_blocks:
            return region
        start, row = region.offset[-1], spec.global_shape[-1]
        first = start // fmt.block * fmt.block
        last = min(row, -(-(start + region.shape[-1]) // fmt.block) * fmt.block)
        return Region((*region.shape[:-1], last - first), (*region.offset[:-1], first))

    def rows(self, start: int, stop: int) -> Tensor:
        """Values of the region's rows ``start .. stop``: FP32 or FP64, flat."""
        wide = self._storage.place.row
        values = self._storage.load(start * wide, stop * wide).view(stop - start, wide)
        return values[:, self._skip : self._skip + self._row].reshape(-1)

    @property
    def unit(self) -> int:
        """Rows to decode at a time are a multiple of this (or all)."""
        return _rows(self._storage.place.unit, self._storage.place.row)


def _rows(unit: int, row: int) -> int:
    """Fewest rows that are a multiple of ``unit`` elements."""
    return math.lcm(unit, row) // row


def _pieces(stored: StoredState, state: ParameterState, role: str) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, values) of the state's flat elements, each piece fit to be stored."""
    place = state.storages[role].place
    unit = math.lcm(stored.unit, _rows(place.unit, place.row))
    step, rows = max(unit, CHUNK // place.row // unit * unit), place.numel // place.row
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield first * place.row, last * place.row, stored.rows(first, last).to(place.device)


@torch.no_grad()
def announce(states: OptimizerStates, recasts: list[Recast], read: Read) -> dict[str, dict[str, Tensor]]:
    """Amax of this rank's part of each state that will be stored with one scale for the whole tensor, by role
    and FQN. The ranks that hold other parts must agree on them (:mod:`fp8train.optim.agreement`)."""
    found: dict[str, dict[str, Tensor]] = {}
    for one in recasts:
        if states[one.fqn].storages[one.role].two_pass:
            state = states.at_work[one.fqn]  # as one scale spans it, it does not come in pieces
            stored = StoredState(one.role, state.spec, state.region, one.stored, read)
            amaxes = [amax_of(values) for _, _, values in _pieces(stored, state, one.role)]
            found.setdefault(one.role, {})[one.fqn] = torch.stack(amaxes).amax()
    return found


@torch.no_grad()
def recast(
    states: OptimizerStates,
    recasts: list[Recast],
    read: Read,
    amaxes: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Read stored states, decode them, and encode them in the run's formats.

    Args:
        states: to write.
        recasts: which.
        read: reads the checkpoint.
        amaxes: by role and FQN, of whole tensors; of the states that :func:`announce` told.
    """
    for one in recasts:
        for _, present in states.visit([one.fqn], (one.role,), write=True):
            for state in present.values():
                stored = StoredState(one.role, state.spec, state.region, one.stored, read)
                target = state.storages[one.role]
                if target.two_pass:
                    target.begin(amaxes[one.role][one.fqn])
                for start, stop, values in _pieces(stored, state, one.role):
                    target.store(start, stop, values, None)
                if target.two_pass:
                    target.end()
