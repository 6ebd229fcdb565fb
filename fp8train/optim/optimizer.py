"""What AdamW and Lion share: states in any format, updated in chunks.

An optimizer keeps, per parameter, a master weight and moments, each in a storage of its own format
(:mod:`fp8train.optim.state_plan`). A rule says how gradient and old values become new ones, in FP32; this
file moves the values. Per parameter, one pass over memory in chunks of at most 2^19 elements::

    for each chunk:  gradient, m, v, w decoded → new m, v, w → encoded → parameter = stored w, rounded

Temporaries are a handful of chunks, whatever the model's size: the step's peak is what is stored. The bits
do not depend on how a tensor is cut: chunks are multiples of 64 elements (vector tails of elementwise kernels
can differ) and of blocks, and random bits are drawn by logical index. Where a state has one scale per tensor,
a first pass computes the same new values only for their amax.

The update uses the new moments before they are rounded, as FP8-LM's own code does: rounding then costs what
the *next* step remembers, not what this one does.

Which parameters get the plan's formats is decided by the logical shape: matrices whose linear multiplies in
FP8. Vectors, embedding and head keep FP32 (FP64 in FP64 runs). Nothing here waits for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.blocks import block_size
from fp8train.numerics.cast import amax_of
from fp8train.numerics.stochastic import stream_key
from fp8train.optim.formats import make_master_storage, make_storage
from fp8train.optim.gradient import GradientReader
from fp8train.optim.state_plan import StateFormat, StatePlan
from fp8train.optim.storage import Layout, Storage
from fp8train.optim.weight_target import WeightTarget

CHUNK = 1 << 19
_FP32 = StateFormat()

NewValues = Iterator[tuple[str, Tensor]]
Load = Callable[[str], Tensor]


@dataclass(frozen=True)
class OptimizerSettings:
    """Hyper-parameters that every rule has; ``lr`` is the peak that the schedule multiplies."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float


@dataclass(frozen=True)
class StepScalars:
    """One step's numbers for one parameter.

    Attributes:
        step: 1-based count of updates.
        lr: learning rate, schedule and the parameter's multiplier included.
        decay: share of the weight to remove.
    """

    step: int
    lr: float
    decay: float


@dataclass(frozen=True)
class ParameterState:
    """One parameter and its states.

    Attributes:
        fqn: its name.
        spec: its description.
        formats: format by role.
        storages: storage by role.
        weight: flat memory of the parameter to write new weights to; None where it needs no writing (the
            master weight lives in it) or where ``target`` takes them.
        target: takes new weights instead of the parameter.
        in_plan: whether the plan's formats apply.
        work: type of the arithmetic.
        chunk: elements per step of the pass.
    """

    fqn: str
    spec: ParamSpec
    formats: Mapping[str, StateFormat]
    storages: Mapping[str, Storage]
    weight: Tensor | None
    target: WeightTarget | None
    in_plan: bool
    work: torch.dtype
    chunk: int

    @property
    def master(self) -> Storage:
        """The master weight."""
        return self.storages["master"]

    @property
    def numel(self) -> int:
        """Local elements."""
        return self.master.layout.numel

    def spans(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the chunks."""
        starts = range(0, self.numel, self.chunk)
        return ((start, min(start + self.chunk, self.numel)) for start in starts)


class Optimizer(ABC):
    """Optimizer of a model's parameters, keyed by FQN. Subclasses are update rules.

    Attributes:
        name: of the rule.
        roles: its states.
        settings: hyper-parameters.
        plan: formats of the matrices in the FP8 plan.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        specs: Mapping[str, ParamSpec],
        settings: OptimizerSettings,
        plan: StatePlan,
        *,
        seed: int,
        weight_targets: Mapping[str, WeightTarget] | None = None,
        offsets: Mapping[str, int] | None = None,
        device: torch.device | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Allocate states. Moments start at zero, and so do master weights until :meth:`seed_master` or a
        checkpoint fills them, except those that live in the parameter.

        Args:
            parameters: local parameters, contiguous. One with a weight target only tells shape and dtype, so
                an empty tensor on the meta device will do (with ``device``).
            specs: their descriptions.
            settings: hyper-parameters.
            plan: formats of matrices in the FP8 plan; without ``exp_avg_sq`` for Lion.
            seed: of stochastic rounding.
            weight_targets: takers of new weights instead of the parameter, by FQN.
            offsets: logical index of the first local element of a parameter of which this rank holds some
                rows; 0 if absent.
            device: where states live; default: where each parameter does.
            chunk: most elements of a chunk.

        Raises:
            ValueError: the plan and the rule do not match; a local row cuts a block.
        """
        self.settings, self.plan, self._seed, self._device = settings, plan, seed, device
        self._chunk, self._offsets = chunk, offsets or {}
        self._check_plan()
        targets = weight_targets or {}
        assert targets.keys() <= parameters.keys(), "a weight target of an unknown parameter"
        self._states = {
            fqn: self._allocate(fqn, parameter, specs[fqn], targets.get(fqn))
            for fqn, parameter in parameters.items()
        }
        self._flushed: dict[str, Tensor] = {}

    @abstractmethod
    def _new_values(self, scalars: StepScalars, gradient: Tensor, load: Load) -> NewValues:
        """The rule: yield each role once with its new values.

        Args:
            scalars: the step's numbers.
            gradient: flat chunk, clipped and averaged, in the type of the arithmetic.
            load: old values of a role in the same type; the rule may overwrite them.
        """

    def _check_plan(self) -> None:
        has_second = self.plan.exp_avg_sq is not None
        if has_second == ("exp_avg_sq" in self.roles):
            return
        remedy = "leave it out" if has_second else "give it a format"
        raise ValueError(f"precision.state.exp_avg_sq: {self.plan.exp_avg_sq} with {self.name}: {remedy}")

    def _allocate(
        self, fqn: str, parameter: Tensor, spec: ParamSpec, target: WeightTarget | None
    ) -> ParameterState:
        in_plan = len(spec.global_shape) == 2 and spec.in_fp8_plan
        assert in_plan or target is None, f"{fqn} is not in the FP8 plan and has a weight target"
        formats = self.plan.formats() if in_plan else dict.fromkeys(self.roles, _FP32)
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        layouts = {role: self._layout(parameter, spec, fmt) for role, fmt in formats.items()}
        memory = None if target is not None else parameter.detach()
        storages = {
            role: make_master_storage(fmt, layouts[role], wide=wide, weight=memory)
            if role == "master"
            else make_storage(fmt, layouts[role], wide=wide)
            for role, fmt in formats.items()
        }
        lives_in_parameter = memory is not None and any(
            tensor.data_ptr() == memory.data_ptr() for tensor in storages["master"].tensors().values()
        )
        unit = math.lcm(*(layout.unit for layout in layouts.values()))
        return ParameterState(
            fqn=fqn,
            spec=spec,
            formats=formats,
            storages=storages,
            weight=None if memory is None or lives_in_parameter else memory.view(-1),
            target=target,
            in_plan=in_plan,
            work=torch.float64 if any(fmt.name == "fp64" for fmt in formats.values()) else wide,
            chunk=max(unit, self._chunk // unit * unit),
        )

    def _layout(self, parameter: Tensor, spec: ParamSpec, fmt: StateFormat) -> Layout:
        shape = tuple(parameter.shape)
        scaled = fmt.is_scaled and fmt.granularity == "block"
        block = block_size(spec.global_shape[-1], fmt.block) if scaled else 1
        if scaled and shape[-1] != spec.global_shape[-1] and shape[-1] % block:
            raise ValueError(
                f"{spec.fqn}: a local row of {shape[-1]} elements cuts a block of {block}; "
                f"legal: multiples of {block}"
            )
        device = parameter.device if self._device is None else self._device
        return Layout(shape, block, self._offsets.get(spec.fqn, 0), device)

    @torch.no_grad()
    def seed_master(self, fqn: str, value: Tensor) -> None:
        """Give a master weight its true initial value (never a rounded one), rounded once to its format.

        Call :meth:`publish` afterwards, so that the model computes with the rounding of what is stored.

        Args:
            fqn: which.
            value: of the parameter's local shape, any float dtype and device.
        """
        state = self._states[fqn]
        flat = value.to(state.master.layout.device, state.work).reshape(-1)
        if state.master.two_pass:
            state.master.begin(amax_of(flat))
        for start, stop in state.spans():
            state.master.store(start, stop, flat[start:stop], None)
        if state.master.two_pass:
            state.master.end()

    def master(self, fqn: str) -> Tensor:
        """The master weight as FP32 (FP64 in FP64 runs), of the parameter's shape."""
        return self.state(fqn, "master")

    def state(self, fqn: str, role: str) -> Tensor:
        """The values of one of a parameter's :attr:`roles`, decoded as a whole: for tests and reports."""
        storage = self._states[fqn].storages[role]
        return storage.load(0, storage.layout.numel).view(storage.layout.shape)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs, as stored: ``master/``, ``exp_avg/`` and ``exp_avg_sq/`` + FQN, followed
        by ``.payload``, ``.scale`` and the like for formats of several tensors. Loading fills them in place
        and calls :meth:`publish`."""
        return {
            f"{role}/{fqn}{suffix}": tensor
            for fqn, state in self._states.items()
            for role, storage in state.storages.items()
            for suffix, tensor in storage.tensors().items()
        }

    def state_meta(self) -> dict[str, str]:
        """Host state of a checkpoint: which rule and formats its tensors belong to."""
        return {"optimizer": self.name, "states": str(self.plan)}

    def load_state_meta(self, meta: Mapping[str, str]) -> None:
        """Check a checkpoint's host state.

        Raises:
            ValueError: it was written by another rule or with other formats.
        """
        for key, setting in (("optimizer", "optimizer.name"), ("states", "precision.state")):
            ours = self.state_meta()[key]
            if (saved := meta.get(key)) != ours:
                raise ValueError(
                    f"{setting}: {ours}, but the checkpoint was written with {saved or 'an older version'}; "
                    "resume with the setting that it was written with"
                )

    def stored_bytes(self, *, in_plan_only: bool) -> dict[str, int]:
        """Bytes of each role's states between steps, scales included. A master that lives in the parameter
        counts here.

        Args:
            in_plan_only: count only parameters that have the plan's formats.
        """
        chosen = [state for state in self._states.values() if state.in_plan or not in_plan_only]
        return {role: sum(state.storages[role].nbytes for state in chosen) for role in self.roles}

    def stored_bytes_of(self, fqns: Collection[str]) -> dict[str, int]:
        """As :meth:`stored_bytes` for these parameters."""
        return {role: sum(self._states[fqn].storages[role].nbytes for fqn in fqns) for role in self.roles}

    def num_elements(self, *, in_plan_only: bool) -> int:
        """Local elements that :meth:`stored_bytes` counts."""
        return sum(state.numel for state in self._states.values() if state.in_plan or not in_plan_only)

    def statistics(self) -> dict[str, Tensor]:
        """``flushed/ROLE``: share of a role's elements, among parameters with the plan's formats, that were
        not zero and were stored as zero by the last step with ``count_flushed``; nothing before one. Device
        scalars."""
        total = self.num_elements(in_plan_only=True)
        return {f"flushed/{role}": count.float() / total for role, count in self._flushed.items()}

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master weights into the model: rounded to the parameters' dtype, or to the weight
        targets."""
        for state in self._states.values():
            self._publish(state)

    def _publish(self, state: ParameterState) -> None:
        amax = _zero(state)
        for start, stop in state.spans():
            amax = self._hand_over(state, start, stop, amax)
        self._write_target(state, amax)

    @staticmethod
    def _hand_over(state: ParameterState, start: int, stop: int, amax: Tensor) -> Tensor:
        """Copy a chunk of the stored master into the parameter, or take its part in a target's amax."""
        if state.target is not None:
            return torch.maximum(amax, amax_of(state.master.load(start, stop)))
        if state.weight is not None:
            state.weight[start:stop].copy_(state.master.load(start, stop))
        return amax

    @staticmethod
    def _write_target(state: ParameterState, amax: Tensor) -> None:
        if state.target is None:
            return
        state.target.begin(amax)
        for start, stop in state.spans():
            state.target.write(start, stop, state.master.load(start, stop).float())
        state.target.end()

    @torch.no_grad()
    def step(
        self,
        grad: Callable[[str], GradientReader],
        *,
        step: int,
        lr_factor: float,
        grad_multiplier: Tensor,
        count_flushed: bool = False,
    ) -> None:
        """Update every parameter. Gradients must be finite.

        Args:
            grad: reader of a gradient by FQN.
            step: 1-based count of updates.
            lr_factor: schedule's factor on the peak rate.
            grad_multiplier: device scalar that multiplies every gradient (clipping).
            count_flushed: fill :meth:`statistics`; costs another decoding of each lossy state.
        """
        self._flushed = {}
        if count_flushed and self.num_elements(in_plan_only=True):
            lossy = [role for role, fmt in self.plan.formats().items() if not fmt.is_exact]
            device = next(state.master.layout.device for state in self._states.values() if state.in_plan)
            self._flushed = {role: torch.zeros((), dtype=torch.int64, device=device) for role in lossy}
        for fqn, state in self._states.items():
            lr = self.settings.lr * lr_factor * state.spec.lr_mult
            scalars = StepScalars(step, lr, self._decay(state.spec, lr, lr_factor))
            self._update(state, grad(fqn), scalars, grad_multiplier.to(state.work))

    def _update(
        self, state: ParameterState, reader: GradientReader, scalars: StepScalars, multiplier: Tensor
    ) -> None:
        two_pass = [storage for storage in state.storages.values() if storage.two_pass]
        if two_pass:
            self._announce(state, reader, scalars, multiplier)
        keys = {role: self._key(state, role, scalars.step) for role in state.storages}
        amax = _zero(state)
        for start, stop in state.spans():
            gradient = reader.chunk(start, stop).to(state.work) * multiplier
            new_values = self._new_values(scalars, gradient, _loader(state, start, stop))
            del gradient  # the rule's alone now, to be freed as soon as it has no more use
            for role, values in new_values:
                state.storages[role].store(start, stop, values, keys[role])
                if role in self._flushed and state.in_plan:
                    stored = state.storages[role].load(start, stop)
                    self._flushed[role] += ((stored == 0) & (values != 0)).sum()
                    del stored
                del values
            if not state.master.two_pass:
                amax = self._hand_over(state, start, stop, amax)
        for storage in two_pass:
            storage.end()
        if state.master.two_pass:
            self._publish(state)
        else:
            self._write_target(state, amax)

    def _announce(
        self, state: ParameterState, reader: GradientReader, scalars: StepScalars, multiplier: Tensor
    ) -> None:
        """The first of two passes: tell storages with one scale per tensor what is coming."""
        amax = {role: _zero(state) for role, storage in state.storages.items() if storage.two_pass}
        for start, stop in state.spans():
            gradient = reader.chunk(start, stop).to(state.work) * multiplier
            for role, values in self._new_values(scalars, gradient, _loader(state, start, stop, fresh=True)):
                if role in amax:
                    amax[role] = torch.maximum(amax[role], amax_of(values))
        for role, value in amax.items():
            state.storages[role].begin(value)

    def _key(self, state: ParameterState, role: str, step: int) -> int | None:
        if state.formats[role].rounding == "nearest":
            return None
        return stream_key(self._seed, step, f"{role}/{state.fqn}")

    def _decay(self, spec: ParamSpec, lr: float, lr_factor: float) -> float:
        """The share of the weight that this step removes."""
        if spec.decay is None:
            return 0.0
        weight_decay = self.settings.weight_decay
        if spec.decay == "lr_times_lambda":
            return lr * weight_decay
        return weight_decay * lr_factor if spec.decay == "independent" else weight_decay


def _zero(state: ParameterState) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=state.master.layout.device)


def _loader(state: ParameterState, start: int, stop: int, *, fresh: bool = False) -> Load:
    """Old values of a chunk; ``fresh``: never the storage's own memory."""

    def load(role: str) -> Tensor:
        storage = state.storages[role]
        values = storage.load(start, stop).to(state.work)
        return values.clone() if fresh and storage.aliases else values

    return load
