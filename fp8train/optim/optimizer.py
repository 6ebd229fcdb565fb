"""What AdamW and Lion share: states in any format, updated in chunks.

An optimizer keeps, per parameter, a master weight and moments, each in a storage of its own format
(:mod:`fp8train.precision.state_formats`). A rule says how gradient and old values become new ones, in FP32;
this file moves the values. Per parameter, one pass over memory in chunks of at most 2^19 elements::

    for each chunk:  gradient, m, v, w decoded → new m, v, w → encoded → parameter = stored w, rounded

Temporaries are a handful of chunks, whatever the model's size: the step's peak is what is stored. The bits
do not depend on how a tensor is cut: chunks are multiples of 64 elements (vector tails of elementwise kernels
can differ) and of blocks, and random bits are drawn by logical index. Where a state has one scale per tensor,
a first pass computes the same new values only for their amax.

The update uses the new moments before they are rounded, as FP8-LM's own code does: rounding then costs what
the *next* step remembers, not what this one does.

Which parameters get the plan's formats is said in :mod:`fp8train.optim.parameter_state`. A rank may keep a
part of a parameter, or nothing of it; scales that span parts are agreed on. Nothing here waits for the
device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.cast import amax_of
from fp8train.numerics.stochastic import stream_key
from fp8train.optim.gradient import GradientReader
from fp8train.optim.parameter_state import ParameterState, Region, allocate
from fp8train.optim.weight_target import WeightTarget
from fp8train.precision.state_formats import StateFormats

CHUNK = 1 << 19

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
        rounded: whether moments come back from their storage rounded.
    """

    step: int
    lr: float
    decay: float
    rounded: bool


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
        plan: StateFormats,
        *,
        seed: int,
        weight_targets: Mapping[str, WeightTarget] | None = None,
        regions: Mapping[str, Region] | None = None,
        agree: Callable[[Tensor], None] | None = None,
        device: torch.device | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """Allocate states. Moments start at zero, and so do master weights until :meth:`seed_master` or a
        checkpoint fills them, except those that live in the parameter.

        Args:
            parameters: memory of the weights whose states this rank keeps, contiguous. One with a weight
                target only tells its dtype, so a tensor on the meta device will do (with ``device``).
            specs: their descriptions, and those of parameters whose states other ranks keep.
            settings: hyper-parameters.
            plan: formats of matrices in the FP8 plan; without ``exp_avg_sq`` for Lion.
            seed: of stochastic rounding.
            weight_targets: takers of new weights instead of the parameter, by FQN; also of parameters whose
                states other ranks keep: those are told the amax, not the values.
            regions: what of a logical parameter ``parameters`` has; default: all that the spec says.
            agree: replaces an FP32 vector by its elementwise maximum over the ranks that hold other parts of
                these parameters, in place; they have equal ``specs``.
            device: where states live; default: where each parameter does.
            chunk: most elements of a chunk.

        Raises:
            ValueError: the plan and the rule do not match; a region cuts a block.
        """
        self.settings, self.plan, self._seed, self._agree = settings, plan, seed, agree
        self._check_plan()
        self._targets = dict(weight_targets or {})
        assert self._targets.keys() <= specs.keys(), "a weight target of an unknown parameter"
        self._position = {fqn: i for i, fqn in enumerate(specs)}
        self._device = device or next((parameter.device for parameter in parameters.values()), None)
        formats = plan.formats()
        self._states = {
            fqn: allocate(
                parameter,
                specs[fqn],
                (regions or {}).get(fqn) or Region.of(specs[fqn]),
                formats,
                self._targets.get(fqn),
                device=device,
                chunk=chunk,
            )
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

    @torch.no_grad()
    def seed_master(self, fqn: str, value: Tensor) -> None:
        """Give a master weight its true initial value (never a rounded one), rounded once to its format.

        Call :meth:`publish` afterwards, so that the model computes with the rounding of what is stored.

        Args:
            fqn: which.
            value: of the logical shape, any float dtype and device; this rank takes its part. Ignored where
                other ranks keep the states.
        """
        if fqn not in self._states:
            return
        state = self._states[fqn]
        part = value
        for dim, (start, size) in enumerate(zip(state.region.offset, state.region.shape, strict=True)):
            part = part.narrow(dim, start, size)
        flat = part.to(state.master.layout.device, state.work).reshape(-1)
        if state.master.two_pass:
            state.master.begin(amax_of(value).to(flat.device))
        for start, stop in state.spans():
            state.master.store(start, stop, flat[start:stop], None)
        if state.master.two_pass:
            state.master.end()

    @property
    def parameter_states(self) -> Mapping[str, ParameterState]:
        """The states that this rank keeps, by FQN of the parameter."""
        return self._states

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
        return {name: tensor for name, (tensor, _, _) in self.logical_tensors().items()}

    def logical_tensors(self) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
        """:meth:`state_tensors` with the shape of each logical tensor and this part's place in it."""
        return {
            name: (tensor, shape, offset)
            for state in self._states.values()
            for name, tensor, shape, offset in state.tensors()
        }

    def state_meta(self) -> dict[str, str]:
        """Host state of a checkpoint: which rule and formats its tensors belong to."""
        return {"optimizer": self.name, "states": str(self.plan)}

    def check_state_meta(self, meta: Mapping[str, str]) -> None:
        """Check a checkpoint's host state: its formats may differ, for states can be recast.

        Raises:
            ValueError: it was written by another rule.
        """
        if (saved := meta.get("optimizer")) != self.name:
            raise ValueError(
                f"optimizer.name: {self.name}, but the checkpoint was written with "
                f"{saved or 'an older version'}; resume with the setting that it was written with"
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
        """Bytes of each role's states for these parameters alone, as far as this rank keeps them; scales
        included."""
        kept = [self._states[fqn] for fqn in fqns if fqn in self._states]
        return {role: sum(state.storages[role].nbytes for state in kept) for role in self.roles}

    def num_elements(self, *, in_plan_only: bool) -> int:
        """Number of elements on this rank whose states :meth:`stored_bytes` counts."""
        return sum(state.numel for state in self._states.values() if state.in_plan or not in_plan_only)

    def peak_decay(self, spec: ParamSpec) -> float:
        """The share of each weight of a parameter that a step at the peak rate removes."""
        return self._decay(spec, self.settings.lr * spec.lr_mult, 1.0)

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
        self._write_targets({state.fqn: self._publish(state) for state in self._states.values()})

    def _publish(self, state: ParameterState) -> Tensor:
        """Write the stored master into the parameter; returns its amax if it has a target instead."""
        amax = _zero(state)
        for start, stop in state.spans():
            amax = self._hand_over(state, start, stop, amax)
        return amax

    @staticmethod
    def _hand_over(state: ParameterState, start: int, stop: int, amax: Tensor) -> Tensor:
        """Copy a chunk of the stored master into the parameter, or take its part in a target's amax."""
        if state.target is not None:
            return torch.maximum(amax, amax_of(state.master.load(start, stop)))
        if state.weight is not None:
            state.weight[start:stop].copy_(state.master.load(start, stop))
        return amax

    def _write_targets(self, amaxes: Mapping[str, Tensor]) -> None:
        """Cast the stored masters into the weight targets, with one scale on all ranks."""
        if not self._targets:
            return
        agreed = self.agreed({fqn: amaxes[fqn] for fqn in self._targets if fqn in amaxes})
        for fqn, target in self._targets.items():
            target.begin(agreed[fqn])
            if (state := self._states.get(fqn)) is not None:
                for start, stop in state.spans():
                    target.write(start, stop, state.master.load(start, stop).float())
            target.end()

    def agreed(self, amaxes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The amaxes of the logical tensors, by FQN, from those of this rank's parts; collective over the
        ranks that hold other parts."""
        if self._agree is None:
            return amaxes
        vector = torch.zeros(len(self._position), device=self._device)
        for fqn, amax in amaxes.items():
            vector[self._position[fqn]] = amax
        self._agree(vector)
        return {fqn: vector[position] for fqn, position in self._position.items()}

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
        updates = {fqn: self._update_of(state, step, lr_factor) for fqn, state in self._states.items()}
        # First pass, only for states with one scale per tensor: the amax of their new values.
        self._announce_all(updates, grad, grad_multiplier)
        # The pass that stores: parameter by parameter, chunk by chunk.
        amaxes = {}
        for fqn, state in self._states.items():
            amaxes[fqn] = self._update(state, grad(fqn), updates[fqn], grad_multiplier.to(state.work))
        # Weights resident in FP8: cast from the stored masters, with one scale on all ranks.
        self._write_targets(amaxes)

    def _update_of(self, state: ParameterState, step: int, lr_factor: float) -> StepScalars:
        lr = self.settings.lr * lr_factor * state.spec.lr_mult
        rounded = any(not fmt.is_exact for role, fmt in state.formats.items() if role != "master")
        return StepScalars(step, lr, self._decay(state.spec, lr, lr_factor), rounded)

    def _update(
        self, state: ParameterState, reader: GradientReader, scalars: StepScalars, multiplier: Tensor
    ) -> Tensor:
        """Returns the amax of a master that has a weight target."""
        two_pass = [storage for storage in state.storages.values() if storage.two_pass]
        keys = {role: self._key(state, role, scalars.step) for role in state.storages}
        amax = _zero(state)
        for start, stop in state.spans():
            # Reduced gradient, decoded with the scales that its codes were made with, times the clip factor:
            # flat [stop - start] in the type of the arithmetic, FP32 or FP64.
            gradient = reader.chunk(start, stop).to(state.work) * multiplier
            # The rule decodes old values when it needs them, and yields each role's new ones once it is done.
            new_values = self._new_values(scalars, gradient, _loader(state, start, stop))
            del gradient  # the rule's alone now, to be freed as soon as it has no more use
            for role, values in new_values:
                # Encoded in the role's own format; a block scale comes from the new values of its block.
                state.storages[role].store(start, stop, values, keys[role])
                if role in self._flushed and state.in_plan:
                    stored = state.storages[role].load(start, stop)
                    self._flushed[role] += ((stored == 0) & (values != 0)).sum()
                    del stored
                del values
            # The master as it was stored, rounded once more into the parameter, or its amax for the target.
            if not state.master.two_pass:
                amax = self._hand_over(state, start, stop, amax)
        for storage in two_pass:  # reads use the new scale from here on
            storage.end()
        return self._publish(state) if state.master.two_pass else amax

    def _announce_all(
        self,
        updates: Mapping[str, StepScalars],
        grad: Callable[[str], GradientReader],
        multiplier: Tensor,
    ) -> None:
        """The first of two passes: tell storages with one scale per tensor what is coming."""
        found: dict[str, dict[str, Tensor]] = {}
        for fqn, state in self._states.items():
            if any(storage.two_pass for storage in state.storages.values()):
                for role, amax in self._announced(
                    state, grad(fqn), updates[fqn], multiplier.to(state.work)
                ).items():
                    found.setdefault(role, {})[fqn] = amax
        for role in (name for name, fmt in self.plan.formats().items() if fmt.two_pass):
            agreed = self.agreed(found.get(role, {}))
            for fqn in found.get(role, {}):
                self._states[fqn].storages[role].begin(agreed[fqn])

    def _announced(
        self, state: ParameterState, reader: GradientReader, scalars: StepScalars, multiplier: Tensor
    ) -> dict[str, Tensor]:
        """Amax of the new values of each role with one scale per tensor."""
        amax = {role: _zero(state) for role, storage in state.storages.items() if storage.two_pass}
        for start, stop in state.spans():
            gradient = reader.chunk(start, stop).to(state.work) * multiplier
            for role, values in self._new_values(scalars, gradient, _loader(state, start, stop, fresh=True)):
                if role in amax:
                    amax[role] = torch.maximum(amax[role], amax_of(values))
        return amax

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
