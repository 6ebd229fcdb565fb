"""Steps at the edge: without targets, after a spike of a million, and what error feedback owes over steps."""

from __future__ import annotations

import pytest
import torch

from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches
from tests.truth.capture import Recorder
from tests.truth.cases import AFTER_A_MILLION, CASES, EXACT, FEEDBACK, SHORT, Case, run_case
from tests.truth.floors import pooled_sums

pytestmark = pytest.mark.usefixtures("one_thread")
END_OF_DOCUMENT = 7
LEVELS = {
    "O0": ("precision.level=O0",),
    "O2": ("precision.level=O2",),
    "feedback": ("precision.level=O2", *FEEDBACK),
    "exact": ("precision.level=O2", *EXACT),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_without_any_target_is_skipped(name: str, before: int) -> None:
    """Its loss is a mean over nothing: neither momentum nor weight decay may move on it."""
    config = Case(LEVELS[name]).config()
    trainer = Trainer(config, alone(), vocab_size=VOCAB, ignore_after=END_OF_DOCUMENT)
    recorder, data = Recorder(trainer), batches(config, alone())
    for step in range(before):
        assert trainer.step(step, data.batch(step)).applied
    bits = recorder.bits()
    empty = torch.full_like(data.batch(before), END_OF_DOCUMENT)
    result = trainer.step(before, empty)
    changed = [name for name, value in recorder.bits().items() if value != bits[name]]
    assert (result.applied, changed) == (False, []), f"{len(changed)} tensors changed: {changed[:4]}"
    assert trainer.step(before + 1, data.batch(before + 1)).applied


def test_exact_reads_gradients_after_a_spike_of_a_million(gloo_pool) -> None:
    """A clipped spike moves the weights no more than any step; what follows it must not read as zero."""
    run = run_case(gloo_pool, AFTER_A_MILLION, len(AFTER_A_MILLION.events))
    flushed = [
        f"step {step.index}: {fqn}: read {parameter.reduced.projection:.3g} times what arrived"
        for step in run.steps[3:]
        for fqn, parameter in step.parameters.items()
        if not 0.9 <= parameter.reduced.projection <= 1.1
    ]
    assert not flushed, f"{len(flushed)} problems\n" + "\n".join(flushed[:8])


@pytest.mark.parametrize("name", ["feedback", "feedback, rows, 2 ranks"])
def test_over_steps_error_feedback_loses_less(gloo_pool, name: str) -> None:
    """The sum of what was applied, against the sum of what arrived times the same multipliers."""
    case = CASES[name]
    without = Case(
        tuple(o for o in case.overrides if o not in FEEDBACK), case.ranks, case.accumulation, case.events
    )
    snr = [pooled_sums(run_case(gloo_pool, one, SHORT)).snr for one in (case, without)]
    assert snr[0] > snr[1] + 3, f"{snr[0]:.1f} dB with error feedback, {snr[1]:.1f} dB without"
