"""The states of one parameter: which formats, of which part of the logical tensor.

Which parameters get the plan's formats is decided by the logical shape: matrices whose linear multiplies in
FP8. Vectors, embedding and head keep FP32 (FP64 in FP64 runs). Which rule updates a parameter is decided by
its role: a matrix rule has the hidden matrices, its element rule all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.models.param_spec import ParamSpec
from fp8train.optim.make_storage import make_master_storage, make_storage
from fp8train.optim.state_storage import StatePlace, Storage, Take
from fp8train.optim.weight_target import WeightTarget
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.rule import MatrixRule, Rule

_FP32 = StateFormat()


@dataclass(frozen=True)
class Region:
    """A rectangle of a logical tensor: shape, and index of its first element."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def of(cls, spec: ParamSpec) -> Region:
        """The part of a parameter that a tensor-parallel rank holds, from its spec."""
        return cls(spec.local_shape, spec.offset)

    def rows(self, first: int, last: int) -> tuple[Region, int]:
        """Rows ``first .. last`` of it, and their first element in it."""
        part = Region((last - first, *self.shape[1:]), (self.offset[0] + first, *self.offset[1:]))
        return part, first * math.prod(self.shape[1:])


@dataclass(frozen=True)
class ParameterState:
    """One parameter and its states.

    Attributes:
        fqn: its name.
        region: what of the logical tensor the states cover.
        spec: its description.
        rule: updates it.
        formats: format by role.
        storages: storage by role.
        weight: flat memory of the parameter to write new weights to; None where it needs no writing (the
            master weight lives in it) or where ``target`` takes them.
        target: takes new weights instead of the parameter.
        in_plan: whether the plan's formats apply.
        work: type of the arithmetic.
        chunk: elements per step of the pass; all of them under a matrix rule.
        start: first element in what this rank keeps of the parameter; 0 unless these states are a piece of
            those (:mod:`fp8train.optim.host_states`).
    """

    fqn: str
    spec: ParamSpec
    region: Region
    rule: Rule
    formats: Mapping[str, StateFormat]
    storages: Mapping[str, Storage]
    weight: Tensor | None
    target: WeightTarget | None
    in_plan: bool
    work: torch.dtype
    chunk: int
    start: int = 0

    @property
    def master(self) -> Storage:
        """The storage of the master weight."""
        return self.storages["master"]

    @property
    def numel(self) -> int:
        """Number of elements that this rank keeps."""
        return self.master.place.numel

    @property
    def bytes_in_parameter(self) -> int:
        """Bytes of the master that are the parameter's own memory."""
        lives_there = self.target is None and self.weight is None
        stored = next(iter(self.master.tensors().values()))  # the upper half, where there are two
        return stored.nbytes if lives_there else 0

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the chunks, in flat elements; together they cover the local tensor in
        order."""
        starts = range(0, self.numel, self.chunk)
        return ((start, min(start + self.chunk, self.numel)) for start in starts)

    def seen_by_rule(self, values: Tensor) -> Tensor:
        """A flat chunk as the rule works on it: itself, or the whole matrix."""
        return values.view(self.region.shape) if isinstance(self.rule, MatrixRule) else values

    def tensors(self) -> Iterator[tuple[str, Tensor, tuple[int, ...], tuple[int, ...]]]:
        """What a checkpoint holds: (``ROLE/FQN`` with a suffix, tensor, logical shape, offset in it)."""
        for role, storage in self.storages.items():
            yield from logical_tensors(role, self.spec, self.region, storage)


def in_plan(spec: ParamSpec) -> bool:
    """Whether a parameter's states have the plan's formats."""
    return len(spec.global_shape) == 2 and spec.in_fp8_plan


def rule_of(rule: Rule, spec: ParamSpec) -> Rule:
    """The rule that updates a parameter: ``rule``, or its element rule where it is no hidden matrix."""
    hidden = spec.role in ("hidden", "residual_out") and len(spec.global_shape) == 2
    return rule if hidden or not isinstance(rule, MatrixRule) else rule.others


def place_of(
    spec: ParamSpec, region: Region, fmt: StateFormat, device: torch.device, take: Take | None = None
) -> StatePlace:
    """Describe where a state of this format lies in memory and within the logical tensor; ``take`` as of
    :class:`StatePlace`.

    Raises:
        ValueError: the region cuts a block.
    """
    row, whole_row = region.shape[-1], spec.global_shape[-1]
    block = fmt.block_in(row, whole_row)
    if row != whole_row and (row % block or region.offset[-1] % block):
        raise ValueError(
            f"{spec.fqn}: a local row of {row} elements cuts a block of {block}; legal: multiples of {block}"
        )
    strides = [math.prod(spec.global_shape[dim + 1 :]) for dim in range(len(spec.global_shape))]
    first = sum(start * stride for start, stride in zip(region.offset, strides, strict=True))
    return StatePlace(region.shape, block, first, device, spec.global_shape[-1], take)


def logical_tensors(
    role: str, spec: ParamSpec, region: Region, storage: Storage
) -> Iterator[tuple[str, Tensor, tuple[int, ...], tuple[int, ...]]]:
    """Yield what a checkpoint holds of one storage: (``ROLE/FQN`` with a suffix, tensor, logical shape,
    offset in it)."""
    block = storage.place.block
    blocks = -(-spec.global_shape[-1] // block)
    for suffix, tensor in storage.tensors().items():
        shape, offset = spec.global_shape, region.offset
        if tuple(tensor.shape) != region.shape:  # a scale for each block, or one for the tensor
            per_block = tensor.dim() > 0
            shape = (*shape[:-1], blocks) if per_block else ()
            offset = (*offset[:-1], offset[-1] // block) if per_block else ()
        yield f"{role}/{spec.fqn}{suffix}", tensor, shape, offset


def allocate(
    parameter: Tensor,
    spec: ParamSpec,
    region: Region,
    rule: Rule,
    plan: StateFormats,
    target: WeightTarget | None,
    *,
    device: torch.device | None,
    chunk: int,
    take: Take | None = None,
) -> ParameterState:
    """States of one parameter, zero but for a master that lives in the parameter.

    Args:
        parameter: the region's memory, contiguous; with ``target`` it only tells dtype and device.
        spec: its description.
        region: what of it the states cover.
        rule: updates it.
        plan: formats of matrices in the FP8 plan; all others have FP32.
        target: takes new weights instead of ``parameter``.
        device: of the states; default: the parameter's.
        chunk: most elements of a chunk.
        take: gives memory for them; None allocates it.

    Raises:
        ValueError: the region cuts a block, or a matrix that the rule needs whole.
    """
    planned = in_plan(spec)
    assert planned or target is None, f"{spec.fqn} is not in the FP8 plan and has a weight target"
    assert target is not None or tuple(parameter.shape) == region.shape, f"{spec.fqn}: {region}"
    whole = isinstance(rule, MatrixRule)
    if whole and region.shape != spec.global_shape:
        raise ValueError(
            f"{spec.fqn}: {rule.name} updates whole matrices, but this rank keeps {region.shape} of "
            f"{spec.global_shape}; no matrix may be cut between ranks"
        )
    formats = {role: plan.formats()[role] if planned else _FP32 for role in rule.roles()}
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    where = parameter.device if device is None else device
    places = {role: place_of(spec, region, fmt, where, take) for role, fmt in formats.items()}
    memory = None if target is not None else parameter.detach()
    storages = {
        role: make_master_storage(fmt, places[role], wide=wide, weight=memory)
        if role == "master"
        else make_storage(fmt, places[role], wide=wide)
        for role, fmt in formats.items()
    }
    lives_in_parameter = any(tensor is memory for tensor in storages["master"].tensors().values())
    unit = math.lcm(*(place.unit for place in places.values()))
    return ParameterState(
        fqn=spec.fqn,
        spec=spec,
        region=region,
        rule=rule,
        formats=formats,
        storages=storages,
        weight=None if memory is None or lives_in_parameter else memory.view(-1),
        target=target,
        in_plan=planned,
        work=torch.float64 if any(fmt.format == "fp64" for fmt in formats.values()) else wide,
        chunk=math.prod(region.shape) if whole else max(unit, chunk // unit * unit),
    )
