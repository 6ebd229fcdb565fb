"""The pass over states in one launch per kind of parameter, where a GPU has the kernel for it.

:class:`~fp8train.optim.optimizer.Optimizer` hands its parameters over; those whose rule, formats and gradient
:mod:`fp8train.kernels.optimizer_update` knows are updated here, and the rest in chunks as on a CPU. Which go
where follows from what they are, and is told by :meth:`FusedPass.describe`.

Parameters of one signature form a group. Its table of addresses is written when the group first occurs; a
step writes the other table, of what changes: gradients' addresses, learning rates, keys of random bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.kernels.fused_op import has_triton
from fp8train.kernels.optimizer_update import (
    BFLOAT16,
    NOTHING,
    NUMBERS,
    PLACES,
    REMAINDER,
    RULES,
    WIDE,
    Signature,
    count_of_programs,
    optimizer_update,
)
from fp8train.numerics.formats import format_of
from fp8train.optim.gradient import GradientReader
from fp8train.optim.parameter_state import ParameterState
from fp8train.optim.state_storage import Stored
from fp8train.parallel.gradients.held import StoredGradient
from fp8train.update_rules.rule import StepScalars

Update = Callable[..., tuple[Tensor, Tensor]]
"""As :data:`fp8train.kernels.optimizer_update.optimizer_update`."""
ROLES = ("master", "exp_avg", "exp_avg_sq")
_FLAT_BLOCK = 128  # elements of a row of a tile where nothing has blocks
_RATES = NUMBERS[NUMBERS.index("keep") :]


def default_update(device: torch.device | None) -> Update | None:
    """The kernel, where states on ``device`` are updated by it; on the meta device it is only counted."""
    if device is None or device.type not in ("cuda", "meta"):
        return None
    return optimizer_update if device.type == "meta" or has_triton() else None


def left_out_because(state: ParameterState) -> str | None:
    """Why the kernel cannot update a parameter, whatever its gradient; None if it can."""
    if state.rule.name not in RULES:
        return f"rule {state.rule.name}"
    if state.work != torch.float32:
        return "FP64"
    for role, storage in state.storages.items():
        if storage.stored() is None:
            return f"{role} in {state.formats[role]}"
    if len(blocks := {state.storages[role].place.block for role in _scaled(state)}) > 1:
        return f"states in blocks of {' and '.join(map(str, sorted(blocks)))}"
    if state.weight is not None and state.weight.dtype not in (torch.bfloat16, torch.float32):
        return f"weight in {state.weight.dtype}"
    return None


def _scaled(state: ParameterState) -> list[str]:
    """Roles that have block scales."""
    return [role for role, fmt in state.formats.items() if fmt.in_blocks]


@dataclass(frozen=True)
class StepOf:
    """One step's numbers of one parameter: for its rule, and keys of random bits by role (None: nearest)."""

    scalars: StepScalars
    keys: Mapping[str, int | None]


@dataclass(frozen=True)
class _Member:
    name: str
    state: ParameterState
    stored: Mapping[str, Stored]
    row: int


class _Group:
    """Parameters of one signature, and their static table."""

    def __init__(self, signature: Signature, members: Sequence[_Member], device: torch.device) -> None:
        self.signature, self.members = signature, members
        self.names = [member.name for member in members]
        states = [[member.stored.get(role) for member in members] for role in ROLES]
        self.memory = [
            [tensor for tensor in tensors if tensor is not None]
            for role in states
            for tensors in (
                [None if stored is None else stored.payload for stored in role],
                [None if stored is None else stored.scale for stored in role],
            )
        ]
        weights = [member.state.weight for member in members]
        self.memory.append([weight for weight in weights if weight is not None])
        rows: list[list[int]] = []
        programs: list[int] = []
        for number, member in enumerate(members):
            rows.append(self._place(member, len(programs)))
            programs += [number] * rows[-1][PLACES.index("programs")]
        self.width = max(row[PLACES.index("programs")] for row in rows)
        self.places = torch.tensor(rows, dtype=torch.int64).to(device)
        self.program_of = torch.tensor(programs, dtype=torch.int32).to(device)

    def _place(self, member: _Member, first_program: int) -> list[int]:
        """The member's row of :data:`~fp8train.kernels.optimizer_update.PLACES`."""
        place, block = member.state.master.place, self.signature.block
        blocks = place.numel // member.row * -(-member.row // block)
        stored = [member.stored.get(role) for role in ROLES]
        tensors = [t for one in stored for t in ((None, None) if one is None else (one.payload, one.scale))]
        logical_row = place.logical_row if self.signature.cut and place.logical_row else member.row
        return [
            *(_address(tensor) for tensor in (*tensors, member.state.weight)),
            *(first_program, count_of_programs(blocks, block), blocks),
            *(member.row, place.offset, logical_row, place.numel),
        ]

    def numbers(self, gradients: Sequence[StoredGradient], steps: Sequence[StepOf]) -> Tensor:
        """The step's table, on the host: int64 [members, NUMBERS]."""
        whole = [
            [
                _address(gradient.values),
                _address(gradient.scales),
                *(step.keys.get(role) or 0 for role in ROLES),
            ]
            for gradient, step in zip(gradients, steps, strict=True)
        ]
        rates = []
        for member, step in zip(self.members, steps, strict=True):
            values = member.state.rule.numbers(step.scalars)
            assert values is not None
            rates.append([values.get(name, 0.0) for name in _RATES])
        bits = torch.tensor(rates, dtype=torch.float32).view(torch.int32).to(torch.int64)
        return torch.cat((torch.tensor(whole, dtype=torch.int64), bits), dim=1)


class FusedPass:
    """Updates parameters in place, all of one signature in one launch.

    Attributes:
        partials: of each parameter that the step has updated, by the name of its states: FP32 numbers on
            the device whose largest is the amax of its new weight, as the model got it: of the stored
            master where a target takes it.
    """

    def __init__(self, states: Mapping[str, ParameterState], update: Update) -> None:
        """Args: ``states``: of this rank, by names of their own; ``update``: the kernel, or its
        reference."""
        self._update = update
        self._left_out = {fqn: why for fqn, state in states.items() if (why := left_out_because(state))}
        self._stored = {
            fqn: {role: one for role, storage in state.storages.items() if (one := storage.stored())}
            for fqn, state in states.items()
            if fqn not in self._left_out and state.numel
        }
        self._states = {fqn: states[fqn] for fqn in self._stored}
        self._groups: dict[tuple[Signature, tuple[str, ...]], _Group] = {}
        self._launches = 0
        self.partials: dict[str, Tensor] = {}

    def describe(self) -> str:
        """Which parameters are updated in one launch of many, which in chunks, and why; of the last step, or
        before one as far as states tell."""
        fused = len({state.fqn for name, state in self._states.items() if name not in self._left_out})
        launches = f" in {self._launches} launches" if self._launches else ""
        line = f"{fused} parameters fused{launches}"
        reasons = Counter(self._left_out.values())
        listed = ", ".join(f"{count} with {why}" for why, count in sorted(reasons.items()))
        return f"{line}; in chunks: {listed}" if listed else line

    def begin(self) -> None:
        """Begin a step: nothing is updated yet."""
        self.partials, self._launches = {}, 0

    def step(
        self,
        grad: Callable[[str], GradientReader],
        steps: Mapping[str, StepOf],
        multiplier: Tensor,
        *,
        count_flushed: bool,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Update what the kernel can of some parameters.

        Args:
            grad: reader of a gradient by the name of its states.
            steps: the step's numbers of those, likewise.
            multiplier: device scalar that multiplies every gradient.
            count_flushed: count values that were stored as zero and were not.

        Returns:
            (amax of each new weight that a target takes, FP32 scalars on the device, by name; count by role,
            device integers, of all parameters that were updated). They join :attr:`partials`.
        """
        found: dict[Signature, list[tuple[str, int, StoredGradient]]] = {}
        for name in steps:
            if (state := self._states.get(name)) is None:
                continue
            gradient = grad(name).stored(state.numel)
            why = _gradient_left_out_because(state, gradient)
            if why is None:
                self._left_out.pop(name, None)
                assert gradient is not None
                signature, row = self._signature(name, state, gradient, count_flushed)
                found.setdefault(signature, []).append((name, row, gradient))
            else:
                self._left_out[name] = why
        amaxes: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        self._launches += len(found)
        for signature, members in found.items():
            group = self._group(signature, [(name, row) for name, row, _ in members])
            gradients = [gradient for _, _, gradient in members]
            of_group = [steps[name] for name in group.names]
            partials, flushed = self._launch(group, gradients, of_group, multiplier)
            self.partials |= dict(zip(group.names, partials.unbind(), strict=True))
            if any(member.state.target is not None for member in group.members):
                amaxes |= dict(zip(group.names, partials.amax(dim=1).unbind(), strict=True))
            if count_flushed:
                for role, count in zip(ROLES, flushed.sum(dim=1).unbind(), strict=True):
                    counts[role] = counts[role] + count if role in counts else count
        return amaxes, counts

    def _signature(
        self, name: str, state: ParameterState, gradient: StoredGradient, count: bool
    ) -> tuple[Signature, int]:
        """A parameter's signature, and elements of a row that blocks cut."""
        stored, place = self._stored[name], state.master.place
        block, row = _FLAT_BLOCK, place.numel
        if scaled := _scaled(state):
            block, row = state.storages[scaled[0]].place.block, place.row
        elif gradient.scales is not None:
            block, row = gradient.values.shape[1], place.row
        cut = any(fmt.rounding == "stochastic" for fmt in state.formats.values())
        cut = cut and place.logical_row not in (None, place.row)
        if cut:
            row = place.row
        random = {role: int(state.formats[role].rounding == "stochastic") for role in stored}
        tensors = [state.weight, gradient.values, *(one.payload for one in stored.values())]
        tensors += [one.scale for one in stored.values() if one.mantissa == REMAINDER]
        second = stored.get("exp_avg_sq")
        signature = Signature(
            rule=RULES.index(state.rule.name),
            gradient=_gradient_format(gradient),
            master=stored["master"].mantissa,
            master_random=random["master"],
            exp_avg=stored["exp_avg"].mantissa,
            exp_avg_random=random["exp_avg"],
            exp_avg_sq=NOTHING if second is None else second.mantissa,
            exp_avg_sq_random=random.get("exp_avg_sq", 0),
            exp_avg_sq_root=int(second is not None and second.root),
            weight=_weight_format(state, stored["master"]),
            block=block,
            ragged=int(row % block != 0),
            cut=int(cut),
            aligned=int(all(_address(tensor) % 16 == 0 for tensor in tensors)),
            counted=int(count),
        )
        return signature, row

    def _group(self, signature: Signature, members: Sequence[tuple[str, int]]) -> _Group:
        key = signature, tuple(name for name, _ in members)
        if key not in self._groups:
            self._groups[key] = _Group(
                signature,
                [_Member(name, self._states[name], self._stored[name], row) for name, row in members],
                self._states[members[0][0]].master.place.device,
            )
        return self._groups[key]

    def _launch(
        self,
        group: _Group,
        gradients: Sequence[StoredGradient],
        steps: Sequence[StepOf],
        multiplier: Tensor,
    ) -> tuple[Tensor, Tensor]:
        numbers, device = group.numbers(gradients, steps), group.places.device
        if device.type == "cuda":  # so that the copy does not wait; the allocator keeps the memory until then
            numbers = numbers.pin_memory().to(device, non_blocking=True)
        result = self._update(
            [gradient.values for gradient in gradients],
            [gradient.scales for gradient in gradients if gradient.scales is not None],
            *group.memory,
            multiplier.float(),
            group.places,
            numbers.to(device),
            group.program_of,
            list(group.signature),
            group.width,
        )
        # Written through addresses: who keeps what follows from a weight asks for its version.
        torch.autograd.graph.increment_version([tensor for role in group.memory for tensor in role])
        return result


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _gradient_format(gradient: StoredGradient) -> int:
    """Its mantissa bits, as signatures have them."""
    if gradient.scales is not None:
        return format_of(gradient.values.dtype).mantissa_bits
    return BFLOAT16 if gradient.values.dtype == torch.bfloat16 else WIDE


def _weight_format(state: ParameterState, master: Stored) -> int:
    """What is written beside the states, as signatures have it."""
    if state.weight is not None:
        return BFLOAT16 if state.weight.dtype == torch.bfloat16 else WIDE
    return REMAINDER if master.mantissa == REMAINDER and state.target is None else NOTHING


def _gradient_left_out_because(state: ParameterState, gradient: StoredGradient | None) -> str | None:
    """Why the kernel cannot read this gradient beside these states; None if it can."""
    if gradient is None:
        return "a gradient that has one scale, is a sum of integers or is in FP64"
    if not gradient.values.is_contiguous():
        return "a gradient that is not contiguous"
    if gradient.scales is not None and (scaled := _scaled(state)):
        block, own = gradient.values.shape[1], state.storages[scaled[0]].place.block
        if block != own:
            return f"a gradient in blocks of {block} and states in blocks of {own}"
    return None
