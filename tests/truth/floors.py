"""Which numbers of a run are good enough, and a sentence for each that is not.

Floors are in dB of energy. They are what the formats allow, a few dB below what is seen: an E4M3 cast alone
has 31.5, E5M2 25. A factor of 2 anywhere is 0 dB and a projection of 2.

Two kinds of recipe cannot follow every event. Delayed scales *lag*: they flush what is much smaller than
their history. Error feedback hands on what the last step lost, so that a step is right together with its
neighbours only. The grid of ``exact`` may be up to 2^5 coarser than this step's gradient needs: a few dB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from fp8train.config.schema import Config
from tests.truth.scenario import Error, Parameter, Run, Step

_REDUCE = {"exact": 28.0, "bf16": 31.0, "fp32": 31.0, "shared_scale": 22.0}
_STATE = {
    "fp32": 120.0,
    "bf16_remainder": 120.0,
    "fp16_scaled": 60.0,
    "bf16": 45.0,
    "e4m3": 25.0,
    "e5m2": 19.0,
}
_GEMM = {"unit_scaling": 9.0}
_FEEDBACK = 24.0  # of what the step before lost, in units of what it applied


def lags(config: Config) -> bool:
    """Whether scales of GEMM operands are those of earlier steps."""
    return config.precision.profile == "paper" or "delayed" in config.precision.recipe


def judged_over_steps(config: Config) -> bool:
    """Whether the GEMMs of a single step say little: scales that lag; four bits; and ``mus``, whose norms at
    the end of branches divide by what is small for some token (seen: 12 dB as a rule, -2 dB in a step of 64
    tokens)."""
    noisy = config.precision.recipe in ("mus", "nvfp4_simulated")
    return lags(config) or (noisy and config.precision.gemm.fp8)


def gemm_floor(config: Config) -> float:
    """Of what is read against the true gradient."""
    if not config.precision.gemm.fp8:
        return 140.0 if config.precision.compute == "fp64" else 30.0
    if judged_over_steps(config):
        return 6.0
    return _GEMM.get(config.precision.recipe, 12.0)


def reduction_floors(config: Config, ranks: int) -> tuple[float, float]:
    """Of what is read against the sum of what arrived: (FP8 gradients, all others)."""
    gradient = config.precision.gradient
    wide = 100.0 if (gradient.accumulate, gradient.reduce) == ("fp32", "fp32") else 45.0
    fp8 = gradient.fp8
    if fp8.reduce != "exchange":
        return _REDUCE[fp8.reduce], wide
    casts = 1 if ranks == 1 or config.parallel.zero != "none" else 2
    casts += fp8.node_size is not None and fp8.between_nodes == "fp8"
    return {1: 30.5, 2: 27.5, 3: 25.0}[casts], wide


def problems(config: Config, run: Run, *, ranks: int) -> list[str]:
    """What is wrong with rank 0's numbers, a sentence each: step, parameter, number."""
    return list(_Judge(config, ranks).problems(run))


@dataclass
class _Judge:
    config: Config
    ranks: int
    before: Step | None = None
    applied_before: Mapping[str, Parameter] = field(default_factory=dict)
    was_plain: bool = True
    over_steps: dict[str, Error] = field(default_factory=dict)

    @property
    def fp8(self):
        return self.config.precision.gradient.fp8

    def problems(self, run: Run) -> Iterator[str]:
        for step in run.steps:
            found = self._skipped(step) if step.event.bad else self._applied(step)
            yield from (f"step {step.index} ({step.event.what}): {problem}" for problem in found)
            if step.parameters:
                self.applied_before = step.parameters
                self.was_plain = step.event.plain
            self.before = step
        for fqn, error in self.over_steps.items():
            yield from (f"over all steps: {fqn}: {problem}" for problem in self._against_the_truth(error))

    def _skipped(self, step: Step) -> Iterator[str]:
        if step.applied:
            yield "applied"
        if step.changed:
            yield f"skipped, but {len(step.changed)} tensors changed: {', '.join(step.changed[:4])}"

    def _applied(self, step: Step) -> Iterator[str]:
        if not step.applied:
            yield "not applied"
            return
        if step.ranks_differ:
            yield "ranks read different gradients"
        loss = step.true_loss
        if abs(step.loss - loss) > 0.02 * abs(loss):
            yield f"loss {step.loss:.5g}, truly {loss:.5g}"
        yield from self._norms(step)
        for fqn, parameter in step.parameters.items():
            yield from (f"{fqn}: {text}" for text in self._read(step, fqn, parameter))
            yield from (f"{fqn}: {text}" for text in self._made_of_it(parameter))
        yield from self._reduced(step)

    def _norms(self, step: Step) -> Iterator[str]:
        if not math.isclose(step.grad_norm, step.read_norm, rel_tol=0.01, abs_tol=1e-12):
            yield f"norm {step.grad_norm:.5g} logged, {step.read_norm:.5g} read"
        clip = self.config.optimizer.clip_grad_norm or math.inf
        if step.applied_norm > 1.01 * clip:
            yield f"applied norm {step.applied_norm:.5g}, clipped to {clip:g}"
        lowest = 0.9 * min(clip, step.true_norm)
        if not lags(self.config) and not self.fp8.error_feedback and step.applied_norm < lowest:
            yield f"applied norm {step.applied_norm:.5g}, truly {min(clip, step.true_norm):.5g}"

    def _read(self, step: Step, fqn: str, parameter: Parameter) -> Iterator[str]:
        """What was read, against the true gradient and against what arrived."""
        error = parameter.gradient
        if error.true == 0 or parameter.reduced.true == 0:
            if parameter.reduced.found > self._handed_on(fqn):
                yield f"read {math.sqrt(parameter.reduced.found):.3g}, but nothing arrived"
            return
        handed_on = self._handed_on(fqn) > error.true * 10 ** (-_FEEDBACK / 10)
        if handed_on:
            return
        if not 0.9 <= parameter.reduced.projection <= 1.1:
            yield f"read {parameter.reduced.projection:.3g} times what arrived"
        lagging = lags(self.config) and not (step.event.plain and self.was_plain and step.index > 1)
        if lagging:
            return
        if judged_over_steps(self.config):
            share = Error(*(energy / error.true for energy in vars(error).values()))
            self.over_steps[fqn] = self.over_steps[fqn] + share if fqn in self.over_steps else share
            return
        yield from self._against_the_truth(error)

    def _against_the_truth(self, error: Error) -> Iterator[str]:
        if not 0.8 <= error.projection <= 1.25:
            yield f"read {error.projection:.3g} times the true gradient"
        if error.snr < gemm_floor(self.config):
            yield f"read at {error.snr:.1f} dB of the true gradient (floor {gemm_floor(self.config):g})"

    def _handed_on(self, fqn: str) -> float:
        """Energy that error feedback may bring from the step before."""
        if not self.fp8.error_feedback or fqn not in self.applied_before:
            return 0.0
        before = self.applied_before[fqn]
        return before.gradient.found * 10 ** (-_FEEDBACK / 10) if before.in_fp8 else 0.0

    def _reduced(self, step: Step) -> Iterator[str]:
        """All parameters together against what arrived."""
        fp8_floor, wide_floor = reduction_floors(self.config, self.ranks)
        for in_fp8, floor in ((True, fp8_floor), (False, wide_floor)):
            chosen = {fqn: p for fqn, p in step.parameters.items() if p.in_fp8 == in_fp8}
            if not chosen:
                continue
            pooled = reduce(add, (p.reduced for p in chosen.values()))
            allowed = sum(self._allowed(fqn, p, floor) for fqn, p in chosen.items())
            if pooled.difference > allowed:
                kind = "FP8 gradients" if in_fp8 else "other gradients"
                best = 10 * math.log10(pooled.true / allowed) if pooled.true and allowed else math.inf
                yield f"{kind} read at {pooled.snr:.1f} dB of what arrived (floor {best:.1f})"
            after_an_outlier = self.before is not None and (
                not self.before.applied or self.before.read_norm > 10 * self.config.optimizer.clip_grad_norm
            )
            if self.fp8.error_feedback and after_an_outlier and pooled.true > 0.01 and pooled.cosine < 0.99:
                yield f"after a skipped step or a spike, cosine {pooled.cosine:.3f} with what arrived"

    def _allowed(self, fqn: str, parameter: Parameter, floor: float) -> float:
        """Energy of the error."""
        return parameter.reduced.true * 10 ** (-floor / 10) + self._handed_on(fqn)

    def _made_of_it(self, parameter: Parameter) -> Iterator[str]:
        """Moments, master and update."""
        state = self.config.precision.state
        for role, error in parameter.states.items():
            name = getattr(state, role).format if parameter.in_plan else "fp32"
            floor = _STATE[name]
            if parameter.in_plan and getattr(state, role).sqrt:
                floor -= 6.0  # squaring doubles the relative error of the root that is stored
            if role == "master" and self.config.optimizer.name == "lion":
                floor = min(floor, 40.0)  # the sign of a sum that cancels depends on its last bit
            if error.true > 0 and error.snr < floor:
                yield f"{role} ({name}) at {error.snr:.1f} dB of FP64's (floor {floor:g})"
        if parameter.update is not None and parameter.update.true > 0 and parameter.update.cosine < 0.9:
            yield f"update has cosine {parameter.update.cosine:.3f} with FP64's"


def pooled_sums(run: Run) -> Error:
    """Of all FP8 gradients: the sum over steps of what was applied against that of what arrived."""
    return reduce(add, run.sums.values())
