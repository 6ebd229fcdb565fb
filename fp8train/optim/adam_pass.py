"""The AdamW pass over parameters with FP32 states, by the multi-tensor kernel of another package.

:class:`~fp8train.optim.optimizer.Optimizer` hands over the parameters whose master weight and moments are
FP32 and whose rule is AdamW; the kernel updates all that share their numbers in a few launches. Other states
(FP8, BF16, two halves) are left to :mod:`fp8train.optim.fused_pass` or to chunks.

The kernel reads FP32 gradients in place and overwrites them, times the multiplier: after the step nobody
reads them. BF16 ones are widened by the package's own cast, FP8 ones decoded, :data:`_WIDENED` elements at a
time. New weights are copied into the parameters in one launch of many; a weight target is told the amax of
its master, as after a pass in chunks.

A decay is a share d of the weight, whatever the rule that made it; the kernel removes η·λ, so λ = d/η. Where
η is 0 and d is not, the decay is a multiplication before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fp8train.kernels.package_kernels import AdamNumbers, MultiTensor
from fp8train.optim.gradient import GradientReader
from fp8train.optim.parameter_state import ParameterState
from fp8train.optim.state_storage import Stored
from fp8train.update_rules.adamw import AdamWSettings
from fp8train.update_rules.rule import StepScalars

ROLES = ("master", "exp_avg", "exp_avg_sq")
_WIDENED = 1 << 26
"""Most elements of gradients that exist in FP32 for one launch alone: 256 MiB."""


def left_out_because(state: ParameterState, most_elements: int) -> str | None:
    """Why a kernel for tensors of so many elements cannot update a parameter; None if it can."""
    if state.rule.name != "adamw":
        return f"rule {state.rule.name}"
    for role, storage in state.storages.items():
        stored = storage.stored()
        if stored is None or stored.payload.dtype != torch.float32 or stored.root:
            return f"{role} in {state.formats[role]}"
    return f"over {most_elements} elements" if state.numel > most_elements else None


class AdamPass:
    """Updates parameters in place, all of one rate and decay in a few launches.

    Attributes:
        states: of the parameters that it updates, or pieces of them, by names of their own.
    """

    def __init__(self, states: Mapping[str, ParameterState], kernels: MultiTensor) -> None:
        """Args: ``states``: of this rank, by names of their own; ``kernels``: on their device."""
        kept = {name: state for name, state in states.items() if state.numel}
        why = {name: left_out_because(state, kernels.most_elements) for name, state in kept.items()}
        self.states = {name: kept[name] for name, reason in why.items() if reason is None}
        left_out = {kept[name].fqn: reason for name, reason in why.items() if reason is not None}
        self._left_out = Counter(left_out.values())
        self._kernels = kernels

    def describe(self) -> str:
        """How many parameters it updates, and why not the others."""
        count = len({state.fqn for state in self.states.values()})
        line = f"{count} parameters by {self._kernels.name}"
        listed = ", ".join(f"{count} with {why}" for why, count in sorted(self._left_out.items()))
        return f"{line}, not {listed}" if listed else line

    def step(
        self,
        grad: Callable[[str], GradientReader],
        steps: Mapping[str, StepScalars],
        multiplier: Tensor,
    ) -> list[str]:
        """Update what it can of some parameters, and write the weights that are no targets.

        Args:
            grad: reader of a gradient by the name of its states.
            steps: the step's numbers of those, likewise.
            multiplier: device scalar that multiplies every gradient.

        Returns:
            Names of what it updated.
        """
        updated = [name for name in self.states if name in steps]
        groups: dict[tuple[AdamNumbers, float], list[str]] = {}
        for name in updated:
            numbers = _numbers(self.states[name], steps[name])
            before = 0.0 if numbers.weight_decay else steps[name].decay
            groups.setdefault((numbers, before), []).append(name)
        for (numbers, before), names in groups.items():
            for batch in self._batches(names, grad):
                self._launch(batch, grad, numbers, before, multiplier)
        return updated

    def _batches(self, names: Sequence[str], grad: Callable[[str], GradientReader]) -> Iterator[list[str]]:
        """Cut where widened gradients would take too much memory."""
        batch: list[str] = []
        widened = 0
        for name in names:
            numel = self.states[name].numel
            values = _values(grad(name), numel)
            own = 0 if values is not None and values.dtype == torch.float32 else numel
            if widened and widened + own > _WIDENED:
                yield batch
                batch, widened = [], 0
            batch.append(name)
            widened += own
        yield batch

    def _launch(
        self,
        names: Sequence[str],
        grad: Callable[[str], GradientReader],
        numbers: AdamNumbers,
        decay: float,
        multiplier: Tensor,
    ) -> None:
        """``decay``: the share of the weights to remove before."""
        states = [self.states[name] for name in names]
        masters, exp_avgs, exp_avg_sqs = ([_memory(state, role) for state in states] for role in ROLES)
        if decay:
            torch._foreach_mul_(masters, 1 - decay)
        gradients = self._widened([(grad(name), self.states[name].numel) for name in names])
        self._kernels.adam(gradients, masters, exp_avgs, exp_avg_sqs, numbers, multiplier)
        copied = [(state.weight, master) for state, master in zip(states, masters, strict=True)]
        weights = [weight for weight, _ in copied if weight is not None]
        if weights:
            torch._foreach_copy_(weights, [master for weight, master in copied if weight is not None])

    def _widened(self, readers: Sequence[tuple[GradientReader, int]]) -> list[Tensor]:
        """The gradients in FP32, flat: in place where they are that, else copies."""
        found = [(_values(reader, numel), reader, numel) for reader, numel in readers]
        narrow = [values for values, _, _ in found if values is not None and values.dtype == torch.bfloat16]
        wide = iter(self._kernels.widen(narrow) if narrow else ())
        return [
            reader.chunk(0, numel)
            if values is None
            else (next(wide) if values.dtype == torch.bfloat16 else values)
            for values, reader, numel in found
        ]


def _values(reader: GradientReader, numel: int) -> Tensor | None:
    """FP32 or BF16 values as they lie in memory; None where only the reader decodes them."""
    stored = reader.stored(numel)
    if stored is None or stored.scales is not None or not stored.values.is_contiguous():
        return None
    return stored.values


def _memory(state: ParameterState, role: str) -> Tensor:
    stored = state.storages[role].stored()
    assert isinstance(stored, Stored)
    return stored.payload.view(-1)


def _numbers(state: ParameterState, scalars: StepScalars) -> AdamNumbers:
    settings = state.rule.settings
    assert isinstance(settings, AdamWSettings)
    return AdamNumbers(
        lr=scalars.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        step=scalars.step,
        weight_decay=scalars.decay / scalars.lr if scalars.lr else 0.0,
    )
