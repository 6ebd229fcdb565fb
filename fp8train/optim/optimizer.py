"""One step of the optimizer: every state through the update rule, in chunks.

An optimizer keeps, per parameter, a master weight and moments, each in a storage of its own format
(:mod:`fp8train.optim.states`). A rule (:mod:`fp8train.update_rules.rule`) says how gradient and old values
become new ones, in FP32; this file moves the values. Per parameter, one pass over memory in chunks of at most
2^19 elements (2^26 on a GPU)::

    for each chunk:  gradient, m, v, w decoded → new m, v, w → encoded → parameter = stored w, rounded

Temporaries are a handful of chunks, whatever the model's size: the step's peak is what is stored. Only a
matrix rule is told a matrix as one chunk. The bits do not depend on how a tensor is cut: chunks are multiples
of 64 elements (vector tails of elementwise kernels can differ) and of blocks, and random bits are drawn by
logical index. Where a state has one scale per tensor, a first pass computes the same new values only for
their amax.

On a GPU most parameters skip the chunks: one kernel updates many of them at once, and reads and writes each
byte once (:mod:`fp8train.optim.fused_pass`). Those with FP32 states may be another package's to update
(:mod:`fp8train.optim.adam_pass`).

The update uses the new moments before they are rounded, as FP8-LM's own code does: rounding then costs what
the *next* step remembers, not what this one does.

Which parameters get the plan's formats is said in :mod:`fp8train.optim.parameter_state`. A rank may keep a
part of a parameter, or nothing of it; scales that span parts are agreed on. States may live in host memory,
and then come a few at a time (:mod:`fp8train.optim.host_states`). Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8train.kernels.package_kernels import MultiTensor
from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.cast import amax_of
from fp8train.numerics.stochastic import stream_key
from fp8train.optim.adam_pass import AdamPass
from fp8train.optim.agreement import Agreement
from fp8train.optim.fused_pass import FusedPass, StepOf, Update, default_update
from fp8train.optim.gradient import GradientReader, PartOfGradient
from fp8train.optim.host_states import Offload, Present
from fp8train.optim.parameter_state import ParameterState, Region, in_plan
from fp8train.optim.publishing import Publisher, zero_amax
from fp8train.optim.states import OptimizerStates
from fp8train.optim.weight_target import WeightTarget
from fp8train.precision.state_formats import StateFormats
from fp8train.update_rules.rule import Load, Rule, StepScalars

CHUNK, GPU_CHUNK = 1 << 19, 1 << 26


@dataclass
class _Running:
    """A step between :meth:`Optimizer.begin` and :meth:`Optimizer.end`.

    Attributes:
        step: count of updates, this one included.
        lr_factor: schedule's factor on the peak rate.
        multiplier: device scalar that multiplies every gradient.
        updated: what :meth:`Optimizer.update` was called for, whoever keeps its states.
        amaxes: of new masters on this rank that have weight targets, by FQN.
        at_once: whether weight targets take new masters when they are stored, not at the end.
    """

    step: int
    lr_factor: float
    multiplier: Tensor
    updated: set[str] = field(default_factory=set)
    amaxes: dict[str, Tensor] = field(default_factory=dict)
    at_once: bool = False


class Optimizer:
    """Optimizer of a model's parameters, keyed by FQN.

    Attributes:
        rule: how they are updated.
        states: master weights and moments.
    """

    def __init__(
        self,
        rule: Rule,
        parameters: Mapping[str, Tensor],
        specs: Mapping[str, ParamSpec],
        plan: StateFormats,
        *,
        seed: int,
        weight_targets: Mapping[str, WeightTarget] | None = None,
        regions: Mapping[str, Region] | None = None,
        agree: Callable[[Tensor], None] | None = None,
        device: torch.device | None = None,
        chunk: int | None = None,
        update: Update | None = None,
        multi_tensor: MultiTensor | None = None,
        offload: Offload | None = None,
    ) -> None:
        """Allocate states. Moments start at zero, and so do master weights until
        :meth:`OptimizerStates.seed_master` or a checkpoint fills them, except those that live in the
        parameter.

        Args:
            rule: update rule with its hyper-parameters.
            parameters: memory of the weights whose states this rank keeps, contiguous. One with a weight
                target only tells its dtype, so a tensor on the meta device will do (with ``device``).
            specs: their descriptions, and those of parameters whose states other ranks keep.
            plan: formats of matrices in the FP8 plan; with ``exp_avg_sq`` if the rule has a second moment.
            seed: of stochastic rounding.
            weight_targets: takers of new weights instead of the parameter, by FQN; also of parameters whose
                states other ranks keep: those are told the amax, not the values.
            regions: what of a logical parameter ``parameters`` has; default: all that the spec says.
            agree: replaces an FP32 vector by its elementwise maximum over the ranks that hold other parts of
                these parameters, in place; they have equal ``specs``.
            device: where states live; default: where each parameter does.
            chunk: most elements of a chunk; default: :data:`CHUNK` on CPUs, elsewhere :data:`GPU_CHUNK`, for
                there a launch costs more than memory.
            update: the kernel of :mod:`fp8train.optim.fused_pass`, or its reference; default: the kernel
                where ``device`` has it, else nothing: all parameters are updated in chunks.
            multi_tensor: kernels that update the parameters with FP32 states before anyone else does.
            offload: keeps states in host memory.

        Raises:
            ValueError: the plan and the rule do not match; a region cuts a block, or a matrix that the rule
                needs whole.
        """
        self.rule, self._seed, self._specs = rule, seed, specs
        targets = dict(weight_targets or {})
        assert targets.keys() <= specs.keys(), "a weight target of an unknown parameter"
        where = device or next((parameter.device for parameter in parameters.values()), None)
        if chunk is None:
            chunk = CHUNK if where is None or where.type == "cpu" else GPU_CHUNK
        self.states = OptimizerStates(
            rule,
            parameters,
            specs,
            plan,
            weight_targets=targets,
            regions=regions or {},
            device=device if offload is None else where,
            chunk=chunk,
            offload=offload,
        )
        self.agreement = Agreement(specs, agree, where)
        self._publisher = Publisher(targets, self.agreement)
        self._flushed: dict[str, Tensor] = {}
        self._running: _Running | None = None
        self._adam = None if multi_tensor is None else AdamPass(self.states.at_work, multi_tensor)
        taken = {} if self._adam is None else self._adam.states
        others = {name: state for name, state in self.states.at_work.items() if name not in taken}
        update = update or default_update(where)
        self._fused = None if update is None else FusedPass(others, update)

    def describe_pass(self) -> str:
        """Say in one line how parameters are updated: which by whose kernel, which in chunks, and why."""
        own = "in chunks" if self._fused is None else self._fused.describe()
        if self._adam is None:
            return f"optimizer step: {own}"
        return f"optimizer step: {self._adam.describe()}; the others: {own}"

    def weight_amax(self) -> Mapping[str, Tensor]:
        """Return, of each parameter that the last step updated in one launch of many, FP32 numbers on the
        device whose largest is the amax of its new weight. What casts the weight need not look for it
        again."""
        return {} if self._fused is None else self._fused.partials

    @torch.no_grad()
    def publish(self) -> None:
        """Write the master weights into the model: rounded to the parameters' dtype, or to the weight
        targets."""
        for present in self.states.visit(self.agreement.fqns, ("master",), write=False):
            self._publisher.publish(present)

    def state_meta(self) -> dict[str, str]:
        """Host state of a checkpoint: which rule and formats its tensors belong to."""
        return {"optimizer": self.rule.name, "states": str(self.states.plan)}

    def check_state_meta(self, meta: Mapping[str, str]) -> None:
        """Check a checkpoint's host state: its formats may differ, for states can be recast.

        Raises:
            ValueError: it was written by another rule.
        """
        if (saved := meta.get("optimizer")) != self.rule.name:
            raise ValueError(
                f"the update rule is {self.rule.name}, but the checkpoint was written with "
                f"{saved or 'an older version'}; resume with the rule that it was written with"
            )

    def peak_decay(self, spec: ParamSpec) -> float:
        """The share of each weight of a parameter that a step at the peak rate removes."""
        return self._decay(spec, self.rule.settings.lr * spec.lr_mult, 1.0)

    def statistics(self) -> dict[str, Tensor]:
        """``flushed/ROLE``: share of a role's elements, among parameters with the plan's formats, that were
        not zero and were stored as zero by the last step with ``count_flushed``; nothing before one. Device
        scalars."""
        total = self.states.num_elements(in_plan_only=True)
        return {f"flushed/{role}": count.float() / total for role, count in self._flushed.items()}

    def step(
        self,
        grad: Callable[[str], GradientReader],
        *,
        step: int,
        lr_factor: float,
        grad_multiplier: Tensor,
        count_flushed: bool = False,
    ) -> None:
        """Update every parameter: :meth:`begin`, :meth:`update` of all, :meth:`end`. Gradients must be
        finite. Arguments as for those."""
        self.begin(
            step=step, lr_factor=lr_factor, grad_multiplier=grad_multiplier, count_flushed=count_flushed
        )
        self._begun().at_once = self.states.in_host_memory  # else masters would have to come a second time
        self.update(grad, self.agreement.fqns)
        self.end()

    def begin(
        self, *, step: int, lr_factor: float, grad_multiplier: Tensor, count_flushed: bool = False
    ) -> None:
        """Begin a step, and forget one that was not ended.

        Args:
            step: 1-based count of updates.
            lr_factor: schedule's factor on the peak rate.
            grad_multiplier: device scalar that multiplies every gradient (clipping).
            count_flushed: fill :meth:`statistics`; costs another decoding of each lossy state.
        """
        self._running = _Running(step, lr_factor, grad_multiplier)
        self._flushed = self._zero_counts() if count_flushed else {}
        if self._fused is not None:
            self._fused.begin()

    @torch.no_grad()
    def update(self, grad: Callable[[str], GradientReader], fqns: Collection[str]) -> None:
        """Update states of these parameters, each once a step, and those weights that are no targets. The
        bits do not depend on how a step is cut into calls. Ranks that hold parts of the same parameters make
        the same calls.

        Args:
            grad: reader of a gradient by FQN, of the parameters whose states this rank keeps.
            fqns: which; ones whose states other ranks keep are passed over.
        """
        running = self._begun()
        assert running.updated.isdisjoint(fqns), "a parameter is updated once a step"
        running.updated.update(fqns)
        for present in self.states.visit(fqns, write=True):
            self._update_present(present, grad, running)
            if running.at_once:
                self._publisher.write_targets(running.amaxes, present)

    @torch.no_grad()
    def end(self) -> None:
        """End the step: weights resident in FP8 are cast from the stored masters of what was updated, with
        one scale on all ranks. Collective where there are several."""
        running = self._begun()
        if not running.at_once:
            waiting = self._publisher.targets.keys() & running.updated
            in_order = [fqn for fqn in self.agreement.fqns if fqn in waiting]
            for present in self.states.visit(in_order, ("master",), write=False):
                self._publisher.write_targets(running.amaxes, present)
        self._running = None

    def _update_present(
        self, present: Present, grad: Callable[[str], GradientReader], running: _Running
    ) -> None:
        """Update what is on the device now."""
        states = present.states
        updates = {
            name: self._update_of(state, running.step, running.lr_factor) for name, state in states.items()
        }

        def reader(name: str) -> GradientReader:
            whole, start = grad(states[name].fqn), states[name].start
            return PartOfGradient(whole, start) if start else whole

        # What a kernel can update as a whole, if there is one.
        by_adam = self._update_by_adam(states, updates, reader, running)
        others = {name: one for name, one in updates.items() if name not in by_adam}
        self._update_fused(states, others, reader, running)
        done = self.weight_amax().keys() | by_adam
        # First pass, only for states with one scale per tensor: the amax of their new values.
        if any(in_plan(self._specs[fqn]) for fqn in present.fqns):
            self._announce_all(states, updates, reader, running.multiplier)
        # The pass that stores: parameter by parameter, chunk by chunk.
        for name, state in states.items():
            if name not in done:
                multiplier = running.multiplier.to(state.work)
                running.amaxes[name] = self._update(state, reader(name), updates[name], multiplier)

    def _begun(self) -> _Running:
        assert self._running is not None, "no step has begun"
        return self._running

    def _zero_counts(self) -> dict[str, Tensor]:
        """Of elements that each lossy role flushes; nothing without a parameter that has the plan's
        formats."""
        at_work = self.states.at_work.values()
        device = next((state.master.place.device for state in at_work if state.in_plan), None)
        if device is None:
            return {}
        lossy = [role for role, fmt in self.states.plan.formats().items() if not fmt.is_exact]
        return {role: torch.zeros((), dtype=torch.int64, device=device) for role in lossy}

    def _update_of(self, state: ParameterState, step: int, lr_factor: float) -> StepScalars:
        lr = self.rule.settings.lr * lr_factor * state.spec.lr_mult
        rounded = any(not fmt.is_exact for role, fmt in state.formats.items() if role != "master")
        return StepScalars(step, lr, self._decay(state.spec, lr, lr_factor), rounded)

    def _update_by_adam(
        self,
        states: Mapping[str, ParameterState],
        updates: Mapping[str, StepScalars],
        grad: Callable[[str], GradientReader],
        running: _Running,
    ) -> set[str]:
        """Names of what another package's kernel has updated."""
        if self._adam is None:
            return set()
        updated = self._adam.step(grad, updates, running.multiplier)
        for name in updated:
            if states[name].target is not None:
                running.amaxes[name] = self._publisher.whole(states[name])
        return set(updated)

    def _update_fused(
        self,
        states: Mapping[str, ParameterState],
        updates: Mapping[str, StepScalars],
        grad: Callable[[str], GradientReader],
        running: _Running,
    ) -> None:
        if self._fused is None:
            return
        steps = {
            name: StepOf(
                one, {role: self._key(states[name], role, one.step) for role in states[name].storages}
            )
            for name, one in updates.items()
        }
        amaxes, counts = self._fused.step(grad, steps, running.multiplier, count_flushed=bool(self._flushed))
        running.amaxes |= amaxes
        for role in self._flushed.keys() & counts.keys():
            self._flushed[role] += counts[role]

    def _update(
        self, state: ParameterState, reader: GradientReader, scalars: StepScalars, multiplier: Tensor
    ) -> Tensor:
        """Returns the amax of a master that has a weight target."""
        two_pass = [storage for storage in state.storages.values() if storage.two_pass]
        keys = {role: self._key(state, role, scalars.step) for role in state.storages}
        amax = zero_amax(state)
        for start, stop in state.spans():
            # Reduced gradient, decoded with the scales that its codes were made with, times the clip factor:
            # in the type of the arithmetic, FP32 or FP64.
            gradient = state.seen_by_rule(reader.chunk(start, stop).to(state.work) * multiplier)
            # The rule decodes old values when it needs them, and yields each role's new ones once it is done.
            new_values = state.rule.new_values(scalars, gradient, _loader(state, start, stop))
            del gradient  # the rule's alone now, to be freed as soon as it has no more use
            for role, values in new_values:
                # Encoded in the role's own format; a block scale comes from the new values of its block.
                values = values.reshape(-1)
                state.storages[role].store(start, stop, values, keys[role])
                if role in self._flushed and state.in_plan:
                    stored = state.storages[role].load(start, stop)
                    self._flushed[role] += ((stored == 0) & (values != 0)).sum()
                    del stored
                del values
            # The master as it was stored, rounded once more into the parameter, or its amax for the target.
            if not state.master.two_pass:
                amax = self._publisher.chunk(state, start, stop, amax)
        for storage in two_pass:  # reads use the new scale from here on
            storage.end()
        return self._publisher.whole(state) if state.master.two_pass else amax

    def _announce_all(
        self,
        states: Mapping[str, ParameterState],
        updates: Mapping[str, StepScalars],
        grad: Callable[[str], GradientReader],
        multiplier: Tensor,
    ) -> None:
        """The first of two passes: tell storages with one scale per tensor what is coming."""
        found: dict[str, dict[str, Tensor]] = {}
        for fqn, state in states.items():
            if any(storage.two_pass for storage in state.storages.values()):
                for role, amax in self._announced(
                    state, grad(fqn), updates[fqn], multiplier.to(state.work)
                ).items():
                    found.setdefault(role, {})[fqn] = amax
        for role in (name for name, fmt in self.states.plan.formats().items() if fmt.two_pass):
            agreed = self.agreement.agreed(found.get(role, {}))
            for fqn in found.get(role, {}):
                states[fqn].storages[role].begin(agreed[fqn])

    def _announced(
        self, state: ParameterState, reader: GradientReader, scalars: StepScalars, multiplier: Tensor
    ) -> dict[str, Tensor]:
        """Amax of the new values of each role with one scale per tensor."""
        amax = {role: zero_amax(state) for role, storage in state.storages.items() if storage.two_pass}
        for start, stop in state.spans():
            gradient = state.seen_by_rule(reader.chunk(start, stop).to(state.work) * multiplier)
            load = _loader(state, start, stop, fresh=True)
            for role, values in state.rule.new_values(scalars, gradient, load):
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
        weight_decay = self.rule.settings.weight_decay
        if spec.decay == "lr_times_lambda":
            return lr * weight_decay
        return weight_decay * lr_factor if spec.decay == "independent" else weight_decay


def _loader(state: ParameterState, start: int, stop: int, *, fresh: bool = False) -> Load:
    """Old values of a chunk; ``fresh``: never the storage's own memory."""

    def load(role: str) -> Tensor:
        storage = state.storages[role]
        values = storage.load(start, stop).to(state.work)
        return state.seen_by_rule(values.clone() if fresh and storage.aliases else values)

    return load
