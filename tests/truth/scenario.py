"""A run of the tiny model through :mod:`tests.truth.events`, and numbers about each of its steps.

:func:`play` runs on every rank. Per applied step and parameter it compares what the optimizer read, and what
it made of that, with FP64: the true gradient of the decoded masters (:mod:`tests.truth.model`), the sum of
what arrived, and the update from the papers (:mod:`tests.truth.adamw`). It returns numbers;
:mod:`tests.truth.floors` says which are good enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.processes import Processes
from fp8train.config.schema import Config
from fp8train.step.result import StepResult
from fp8train.step.targets import inputs_and_targets
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches
from tests.truth.adamw import Rule, cosine, updated
from tests.truth.capture import OnRank, Recorder, over_ranks
from tests.truth.events import Event
from tests.truth.model import Truth, decoder_truth, llama_truth, scaled_outputs


@dataclass(frozen=True)
class Error:
    """Energies of a true vector, of what was found, of their difference, and their inner product."""

    true: float
    found: float
    difference: float
    product: float

    @classmethod
    def of(cls, found: Tensor, true: Tensor) -> Error:
        return cls(
            *(
                float((a * b).sum())
                for a, b in ((true, true), (found, found), (found - true,) * 2, (found, true))
            )
        )

    def __add__(self, other: Error) -> Error:
        return Error(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def snr(self) -> float:
        """In dB; infinite where nothing differs."""
        if self.difference == 0:
            return math.inf
        return 10 * math.log10(self.true / self.difference) if self.true > 0 else -math.inf

    @property
    def projection(self) -> float:
        """``<found, true> / <true, true>``: 2 where everything is twice too large."""
        return self.product / self.true if self.true > 0 else math.nan

    @property
    def cosine(self) -> float:
        size = math.sqrt(self.true * self.found)
        return self.product / size if size > 0 else math.nan


@dataclass(frozen=True)
class Parameter:
    """One parameter in one step.

    Attributes:
        in_fp8: whether its gradient is stored in FP8.
        in_plan: whether its states have the formats of the configuration; FP32 else.
        gradient: what was read, times the multiplier, against the true gradient, clipped by its true norm.
        reduced: what was read against the FP64 sum over ranks and micro-batches of what arrived.
        states: new states against those of FP64, by role.
        update: change of the master against that of FP64.
    """

    in_fp8: bool
    in_plan: bool
    gradient: Error
    reduced: Error
    states: dict[str, Error] = field(default_factory=dict)
    update: Error | None = None


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        result: applied, norm and loss as the trainer reports them.
        true_norm: of the true gradient, before clipping.
        read_norm: of what was read, before clipping.
        applied_norm: of what was read, after it.
        parameters: by name; empty for a skipped step.
        changed: names of tensors with other bits than before.
        ranks_differ: ranks did not read the same.
    """

    index: int
    event: Event
    applied: bool
    loss: float
    grad_norm: float
    true_norm: float
    true_loss: float
    read_norm: float = math.nan
    applied_norm: float = math.nan
    parameters: dict[str, Parameter] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    ranks_differ: bool = False


@dataclass(frozen=True)
class Run:
    """All steps, and over the applied ones the sum of what was applied against that of what arrived, by
    parameter with an FP8 gradient, in the same (clipped) units."""

    steps: list[Step]
    sums: dict[str, Error]


def play(config: Config, processes: Processes, events: Sequence[Event], *, is_llama: bool = True) -> Run:
    """Run the events. On ranks but the first, steps have no parameters.

    Args:
        config: of the run; its schedule is the cosine.
        processes: data-parallel ranks only.
        events: one a step.
        is_llama: the standard parametrisation, for which :func:`llama_truth` holds.
    """
    torch.manual_seed(0)
    scenario = _Scenario(config, processes, is_llama)
    steps = [scenario.step(index, event) for index, event in enumerate(events)]
    return Run(steps, scenario.sums())


class _Scenario:
    def __init__(self, config: Config, processes: Processes, is_llama: bool) -> None:
        self.config, self.processes, self.is_llama = config, processes, is_llama
        self.trainer = Trainer(config, processes, vocab_size=VOCAB)
        self.recorder = Recorder(self.trainer)
        self.flat = self.recorder.flat
        self.data, self.all_data = batches(config, processes), batches(config, alone())
        self.before, self.bits = self.recorder.states(), self.recorder.bits()
        self.applied_sum, self.true_sum = self.flat.zeros(), self.flat.zeros()
        fp8 = config.precision.gradient.format != "high_precision"
        self.in_fp8 = {fqn: fp8 and spec.in_fp8_plan for fqn, spec in self.trainer.model.specs.items()}

    def step(self, index: int, event: Event) -> Step:
        result = self._train(index, event)
        seen = self.recorder.seen
        arrived = over_ranks(seen.arrived)
        after, bits = self.recorder.states(), self.recorder.bits()
        truth = self._truth(index, event) if self.processes.rank == 0 else None
        found = self._judge(index, event, result, seen, arrived, after, truth, bits)
        self.before, self.bits = after, bits
        return found

    def _train(self, index: int, event: Event) -> StepResult:
        forward, last = self.trainer.model.forward, self.processes.rank == self.processes.world_size - 1
        factor = math.inf if event.bad and last else event.loss
        with ExitStack() as stack:
            stack.enter_context(scaled_outputs(self.trainer.model, event.modules))
            self.trainer.model.forward = lambda *args: forward(*args) * factor  # type: ignore[method-assign]
            stack.callback(setattr, self.trainer.model, "forward", forward)
            return self.trainer.step(index, self.data.batch(index))

    def _truth(self, index: int, event: Event) -> Truth:
        """Of this event's loss, by the masters before the step."""
        weights = self.flat.unpacked(self.before["master"])
        inputs, targets = inputs_and_targets(self.all_data.batch(index).flatten(0, 1), None)
        if self.is_llama:
            truth = llama_truth(weights, inputs, targets, self.trainer.model.config, factors=event.modules)
        else:
            truth = decoder_truth(
                weights, inputs, targets, self.config, vocab_size=VOCAB, factors=event.modules
            )
        return Truth(truth.loss * event.loss, {fqn: g * event.loss for fqn, g in truth.gradients.items()})

    def _judge(
        self,
        index: int,
        event: Event,
        result: StepResult,
        seen: OnRank,
        arrived: Tensor,
        after: dict[str, Tensor],
        truth: Truth | None,
        bits: dict[str, str],
    ) -> Step:
        changed = tuple(name for name in bits if bits[name] != self.bits[name])
        read, differ = None, False
        if seen.read is not None:
            read = self.recorder.whole(seen.read)
            differ = bool((over_ranks(read, dist.ReduceOp.MAX) != over_ranks(read, dist.ReduceOp.MIN)).any())
        if truth is None:  # another rank measures
            nan = math.nan
            return Step(index, event, result.applied, nan, result.grad_norm, nan, nan, changed=changed)
        true = self.flat.packed(truth.gradients)
        true_norm = self._norm(true)
        numbers = (result.applied, float(result.loss), result.grad_norm, true_norm, truth.loss)
        if read is None:
            return Step(index, event, *numbers, changed=changed, ranks_differ=differ)
        clip = self.config.optimizer.clip_grad_norm
        true *= min(1.0, clip / true_norm) if clip and true_norm else 1.0
        applied = read * seen.multiplier
        rule = self.trainer.model.parametrization
        read_norm = self._norm(read) / (rule.gradient_scale if rule.true_gradients else 1.0)
        self.applied_sum += applied
        self.true_sum += arrived * seen.multiplier
        expected = self._updated(applied, index)
        parameters = {
            fqn: Parameter(
                self.in_fp8[fqn],
                self.trainer.model.specs[fqn].in_fp8_plan,
                self._error(applied, true, fqn),
                self._error(read, arrived, fqn),
                {role: self._error(after[role], new, fqn) for role, new in expected.items()},
                self._error(
                    after["master"] - self.before["master"], expected["master"] - self.before["master"], fqn
                ),
            )
            for fqn in self.flat.shapes
        }
        return Step(index, event, *numbers, read_norm, self._norm(applied), parameters, changed, differ)

    def _norm(self, vector: Tensor) -> float:
        """Of the gradients of effective weights (``tests/models/test_norm_weight.py`` holds the factors
        against finite differences)."""
        model = self.trainer.model
        weights = {fqn: model.parametrization.norm_weight(spec) for fqn, spec in model.specs.items()}
        parts = self.flat.unpacked(vector)
        return math.sqrt(sum(float(part.square().sum()) * weights[f] ** 2 for f, part in parts.items()))

    def _error(self, found: Tensor, true: Tensor, fqn: str) -> Error:
        return Error.of(self.flat.of(found, fqn), self.flat.of(true, fqn))

    def _updated(self, gradient: Tensor, index: int) -> dict[str, Tensor]:
        """New states from the decoded old ones."""
        o, schedule, trainer = self.config.optimizer, self.config.schedule, self.trainer
        assert schedule.kind == "cosine" and not schedule.warmup_steps and not schedule.warmup_fraction
        factor = cosine(index, self.config.total_steps, lowest=schedule.min_lr_ratio)
        rule = Rule(o.name, o.lr, o.beta1, o.beta2, o.eps * trainer.model.parametrization.eps_unit)
        found = {role: self.flat.zeros() for role in self.before}
        exact = all(
            getattr(self.config.precision.state, role).format == "fp32"
            for role in self.before
            if role != "master"
        )
        for fqn, spec in trainer.model.specs.items():
            lr = o.lr * factor * spec.lr_mult
            if spec.decay is None:
                decay = 0.0
            else:
                decay = o.weight_decay * {"lr_times_lambda": lr, "independent": factor}.get(spec.decay, 1.0)
            old = {role: self.flat.of(vector, fqn) for role, vector in self.before.items()}
            new = updated(
                rule,
                self.flat.of(gradient, fqn),
                old,
                step=trainer.updates,
                lr=lr,
                decay=decay,
                rounded=spec.in_fp8_plan and not exact and self.config.precision.state.bounded_update,
            )
            for role, values in new.items():
                self.flat.of(found[role], fqn).copy_(values)
        return found

    def sums(self) -> dict[str, Error]:
        return {
            fqn: self._error(self.applied_sum, self.true_sum, fqn)
            for fqn, in_fp8 in self.in_fp8.items()
            if in_fp8 and self.processes.rank == 0
        }
