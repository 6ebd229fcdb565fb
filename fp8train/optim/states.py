"""The states of a rank's parameters: master weights and moments, each in its own format.

They are allocated, seeded, counted and shown to checkpoints here; :mod:`fp8train.optim.optimizer` moves them
through an update rule. Of the rule they know what it declares: which moments it keeps, and whether it needs
matrices whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fp8train.models.param_spec import ParamSpec
from fp8train.numerics.cast import amax_of
from fp8train.optim import offload_plan
from fp8train.optim.host_states import HostStates, Offload, Present, Rows
from fp8train.optim.parameter_state import ParameterState, Region, allocate, in_plan, rule_of
from fp8train.optim.state_storage import Take
from fp8train.optim.weight_target import WeightTarget
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.rule import MatrixRule, Rule


class OptimizerStates(Mapping[str, ParameterState]):
    """The states that this rank keeps, by FQN of the parameter.

    They may live in host memory (:mod:`fp8train.optim.host_states`). So what computes with their values does
    it while :meth:`visit` shows them; what is stored may be read and filled any time (:meth:`tensors`).

    Attributes:
        plan: formats of the matrices in the FP8 plan.
        roles: the kinds of states that a parameter may have.
    """

    def __init__(
        self,
        rule: Rule,
        parameters: Mapping[str, Tensor],
        specs: Mapping[str, ParamSpec],
        plan: StateFormats,
        *,
        weight_targets: Mapping[str, WeightTarget],
        regions: Mapping[str, Region],
        device: torch.device | None,
        chunk: int,
        offload: Offload | None,
    ) -> None:
        """Allocate; see :class:`~fp8train.optim.optimizer.Optimizer` for the arguments.

        Raises:
            ValueError: the plan and the rule do not match; a region cuts a block, or a matrix that the rule
                needs whole.
        """
        self.plan, self.roles = plan, _roles(rule)
        if (plan.exp_avg_sq is not None) != rule.has_second_moment:
            keeps = "a" if rule.has_second_moment else "no"
            raise ValueError(f"{rule.name} keeps {keeps} second moment, but its format is {plan.exp_avg_sq}")

        def make(
            fqn: str, rows: Rows | None, *, device: torch.device | None, take: Take | None
        ) -> ParameterState:
            parameter, spec = parameters[fqn], specs[fqn]
            region, start = regions.get(fqn) or Region.of(spec), 0
            if rows is not None:
                parameter, (region, start) = parameter[slice(*rows)], region.rows(*rows)
            state = allocate(
                parameter,
                spec,
                region,
                rule_of(rule, spec),
                plan,
                weight_targets.get(fqn),
                device=device,
                chunk=chunk,
                take=take,
            )
            return replace(state, start=start)

        self._host: HostStates | None = None
        if offload is None:
            self._kept = {fqn: make(fqn, None, device=device, take=None) for fqn in parameters}
        else:
            assert device is not None, "states in host memory need a device to visit"
            sizes = {fqn: _bytes(plan, rule, spec) / offload.shards for fqn, spec in specs.items()}
            loads = offload_plan.loads(sizes, offload.slot_bytes)
            self._host = HostStates(make, parameters, loads, offload, device)
            self._kept = self._host.home

    def __getitem__(self, fqn: str) -> ParameterState:
        return self._kept[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def in_host_memory(self) -> bool:
        """Whether they live there, and not on the device that the step runs on."""
        return self._host is not None

    @property
    def slot_bytes(self) -> int:
        """Device memory that states in host memory visit."""
        return 0 if self._host is None else self._host.slot_bytes

    @property
    def at_work(self) -> Mapping[str, ParameterState]:
        """The states as :meth:`visit` shows them, by the names that they have there. Addresses never change;
        values are to be read and written during the visit alone."""
        return self._kept if self._host is None else self._host.at_work

    def visit(
        self, fqns: Collection[str], roles: Collection[str] | None = None, *, write: bool
    ) -> Iterator[Present]:
        """Show the states of some parameters where arithmetic may read and write them: all at once, or a few
        at a time where they live in host memory. Ranks that agree on amaxes see parameters in the same order.

        Args:
            fqns: which; also ones whose states other ranks keep.
            roles: states that matter; None: all.
            write: whether they change; else changes may be lost.
        """
        if self._host is not None:
            return self._host.visit(fqns, roles, write=write)
        kept = {fqn: self._kept[fqn] for fqn in fqns if fqn in self._kept}
        return iter([Present(tuple(fqns), kept)])

    @torch.no_grad()
    def seed_master(self, fqn: str, value: Tensor) -> None:
        """Give a master weight its true initial value (never a rounded one), rounded once to its format.

        Publish the weights afterwards, so that the model computes with the rounding of what is stored.

        Args:
            fqn: which.
            value: of the logical shape, any float dtype and device; this rank takes its part. Ignored where
                other ranks keep the states.
        """
        for _, states in self.visit([fqn], ("master",), write=True):
            for state in states.values():
                _seed(state, value)

    def master(self, fqn: str) -> Tensor:
        """The master weight as FP32 (FP64 in FP64 runs), of the parameter's shape."""
        return self.decoded(fqn, "master")

    def decoded(self, fqn: str, role: str) -> Tensor:
        """The values of one of a parameter's states, decoded as a whole: for tests and reports."""
        pieces = [
            values.clone() if self.in_host_memory else values  # as slots are used again
            for _, states in self.visit([fqn], (role,), write=False)
            for state in states.values()
            for values in [state.storages[role].load(0, state.numel)]
        ]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole.view(self._kept[fqn].region.shape)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs, as stored: ``master/``, ``exp_avg/`` and ``exp_avg_sq/`` + FQN, followed
        by ``.payload``, ``.scale`` and the like for formats of several tensors. Loading fills them in place
        and publishes the weights. Good until the next visit that writes."""
        return {name: tensor for name, (tensor, _, _) in self.logical_tensors().items()}

    def logical_tensors(self) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
        """:meth:`tensors` with the shape of each logical tensor and this part's place in it."""
        if self._host is not None:
            self._host.settle()
        return {
            name: (tensor, shape, offset)
            for state in self._kept.values()
            for name, tensor, shape, offset in state.tensors()
        }

    def stored_bytes(self, *, in_plan_only: bool) -> dict[str, int]:
        """Bytes of each role's states between steps, scales included. A master that lives in the parameter
        counts here.

        Args:
            in_plan_only: count only parameters that have the plan's formats.
        """
        return self.stored_bytes_of(self._in_plan() if in_plan_only else self._kept)

    def stored_bytes_of(self, fqns: Collection[str]) -> dict[str, int]:
        """Bytes of each role's states for these parameters alone, as far as this rank keeps them; scales
        included."""
        kept = [self._kept[fqn].storages for fqn in fqns if fqn in self._kept]
        return {
            role: sum(storages[role].nbytes for storages in kept if role in storages) for role in self.roles
        }

    def scale_bytes_of(self, fqns: Collection[str]) -> dict[str, int]:
        """What of :meth:`stored_bytes_of` is scales."""
        kept = [self._kept[fqn].storages for fqn in fqns if fqn in self._kept]
        return {
            role: sum(storages[role].scale_bytes for storages in kept if role in storages)
            for role in self.roles
        }

    def bytes_in_parameters(self, fqns: Collection[str]) -> int:
        """What of the masters in :meth:`stored_bytes_of` is memory of the parameters themselves."""
        kept = [self._kept[fqn] for fqn in fqns if fqn in self._kept]
        return sum(state.bytes_in_parameter for state in kept)

    def num_elements(self, *, in_plan_only: bool) -> int:
        """Number of elements on this rank whose states :meth:`stored_bytes` counts."""
        return sum(self._kept[fqn].numel for fqn in (self._in_plan() if in_plan_only else self._kept))

    def _in_plan(self) -> list[str]:
        return [fqn for fqn, state in self._kept.items() if state.in_plan]


def _seed(state: ParameterState, value: Tensor) -> None:
    """Store the state's part of a logical value as its master."""
    part = value
    for dim, (start, size) in enumerate(zip(state.region.offset, state.region.shape, strict=True)):
        part = part.narrow(dim, start, size)
    flat = part.to(state.master.place.device, state.work).reshape(-1)
    if state.master.two_pass:
        state.master.begin(amax_of(value).to(flat.device))
    for start, stop in state.spans():
        state.master.store(start, stop, flat[start:stop], None)
    if state.master.two_pass:
        state.master.end()


def _bytes(plan: StateFormats, rule: Rule, spec: ParamSpec) -> int:
    """Bytes of the states of what one rank holds of a parameter, without scales."""
    formats, roles = plan.formats(), rule_of(rule, spec).roles()
    each = [formats[role] if in_plan(spec) else StateFormat() for role in roles]
    return math.prod(spec.local_shape) * sum(map(offload_plan.element_bytes, each))


def _roles(rule: Rule) -> tuple[str, ...]:
    """Of a rule and, where it has one, its element rule."""
    others = rule.others.roles() if isinstance(rule, MatrixRule) else ()
    return tuple(dict.fromkeys((*rule.roles(), *others)))
