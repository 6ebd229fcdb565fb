"""What a spike is, next to the formula in NumPy; and what a trainer does about one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fp8train.config.errors import ConfigError
from fp8train.config.spikes_schema import SpikesConfig
from fp8train.step.non_finite import DivergedError, SkippedSteps
from fp8train.step.result import StepResult
from fp8train.step.spikes import SpikeDetector
from fp8train.step.trainer import Trainer
from tests.training.tiny import VOCAB, alone, batches, tiny_config


def taught(**settings: object) -> tuple[SpikeDetector, np.ndarray, np.ndarray]:
    """A detector after 40 steps of noise, and what it saw."""
    detector = SpikeDetector(SpikesConfig.model_validate({"window": 32, "min_steps": 8, **settings}))
    random = np.random.default_rng(3)
    losses, norms = 3 + 0.1 * random.standard_normal(40), np.exp(0.3 * random.standard_normal(40))
    for loss, norm in zip(losses, norms, strict=True):
        detector.learn(loss=float(loss), grad_norm=float(norm))
    return detector, losses[-32:], norms[-32:]


def sigmas(value: float, known: np.ndarray) -> float:
    """The formula, independently."""
    middle = np.median(known)
    return float((value - middle) / (1.4826 * np.median(np.abs(known - middle))))


@pytest.mark.parametrize("offset", [-0.01, 0.01])
def test_the_threshold_is_where_the_formula_says(offset: float) -> None:
    detector, losses, norms = taught(threshold=6.0)
    edge = float(np.median(losses) + (6 + offset) * (3.5 - np.median(losses)) / sigmas(3.5, losses))
    found = detector.judge(41, loss=edge, grad_norm=1.0)
    assert (found is not None) == (offset > 0)
    if found is not None:
        assert found.sigmas == pytest.approx(sigmas(edge, losses), rel=1e-9)
        assert (found.quantity, found.usual) == ("loss", pytest.approx(np.median(losses)))
    logs = np.log(norms)
    large = math.exp(np.median(logs) + (6 + offset) * (9 - np.median(logs)) / sigmas(9, logs))
    found = detector.judge(41, loss=3.0, grad_norm=large)
    assert (found is not None) == (offset > 0)
    if found is not None:
        assert found.sigmas == pytest.approx(sigmas(math.log(large), logs), rel=1e-9)


def test_values_that_hardly_vary_and_slow_rises_are_no_spikes() -> None:
    detector = SpikeDetector(SpikesConfig(window=16, min_steps=4))
    for step in range(400):
        loss, norm = 2.0 + 0.001 * step, 1.01**step
        assert detector.judge(step, loss=loss, grad_norm=norm) is None, step
        detector.learn(loss=loss, grad_norm=norm)
    assert detector.judge(401, loss=2.45, grad_norm=53.0) is None, "within the floors of 1 % and 0.1"
    jumped = detector.judge(401, loss=2.45, grad_norm=530.0)
    assert jumped is not None and jumped.quantity == "grad_norm"


def test_before_enough_is_known_only_what_no_warm_up_explains_is_a_spike() -> None:
    detector = SpikeDetector(SpikesConfig())
    for step, norm in enumerate([0.1, 5.0, 40.0], start=1):  # as a warm-up may begin
        assert detector.judge(step, loss=9.0, grad_norm=1e9) is None, "too little is known"
        detector.learn(loss=9.0, grad_norm=norm)
    detector.learn(loss=1e3, grad_norm=1.0)
    assert detector.judge(5, loss=1e9, grad_norm=3999.0) is None
    spike = detector.judge(5, loss=9.0, grad_norm=4001.0)
    assert spike is not None and (spike.quantity, spike.usual) == ("grad_norm", 3.0)


def test_a_lasting_jump_becomes_usual_and_warnings_pause() -> None:
    detector, *_ = taught(cooldown=5)
    told = []
    for step in range(41, 81):
        loss = 6.0 + 0.01 * step
        spike = detector.judge(step, loss=loss, grad_norm=1.0)
        if spike is not None and detector.is_told(spike):
            told.append(step)
        detector.learn(loss=loss, grad_norm=1.0)
    assert told == [41, 47, 53], "half of 32 steps are above then"


def test_the_state_is_json_and_keeps_every_bit() -> None:
    detector, *_ = taught()
    assert detector.is_told(detector.judge(41, loss=9.0, grad_norm=1.0))  # type: ignore[arg-type]
    copy = SpikeDetector(detector.config)
    copy.load_state(json.loads(json.dumps(detector.state())))
    assert copy.__dict__ == detector.__dict__


def losses_of(trainer: Trainer, spike_at: int | None, steps: int = 8) -> list[StepResult]:
    """Steps of one process; in one of them gradients are a million times as large."""
    data, found = batches(trainer.config, trainer.processes), []
    accumulate = trainer._accumulate
    for step in range(steps):
        if step == spike_at:
            trainer._accumulate = lambda x, y, n: accumulate(x, y, n / 1e6)  # type: ignore[method-assign]
        found.append(trainer.step(step, data.batch(step)))
        trainer._accumulate = accumulate  # type: ignore[method-assign]
    return found


def trainer_with(*spikes: str) -> Trainer:
    overrides = ["precision.level=O2", *(f"spikes.{one}" for one in spikes)]
    return Trainer(tiny_config(overrides), alone(), vocab_size=VOCAB)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in trainer.state_tensors().items() if "/events/" not in name}


def test_warnings_change_no_bit_and_a_skipped_spike_leaves_none() -> None:
    small = ["min_steps=4", "window=8"]
    warned, off, skips, told = (
        trainer_with(*settings)
        for settings in (small, ["action=off"], ["action=skip", *small], ["action=off"])
    )
    results = losses_of(warned, 5)
    losses_of(off, 5)
    (event,) = results[5].events
    assert (event.kind, event.fields["quantity"], event.fields["action"]) == ("spike", "grad_norm", "warn")
    assert event.fields["value"] == results[5].grad_norm > 1e5 * event.fields["usual"]
    assert all(torch.equal(x, weights(off)[name]) for name, x in weights(warned).items())

    results = losses_of(skips, 5)
    assert [result.skipped for result in results] == ["", "", "", "", "", "spike", "", ""]
    data = batches(told.config, told.processes)
    for step in (0, 1, 2, 3, 4, 6, 7):
        told.step(step, data.batch(step))
    assert all(torch.equal(x, weights(told)[name]) for name, x in weights(skips).items())


def test_too_many_skipped_steps_end_the_run() -> None:
    skipped = SkippedSteps(3)
    for done, why in enumerate(["spike", "spike", "", "not_finite", "spike"], 1):
        skipped.count(done, StepResult(torch.tensor(1.0), 1.0, 0.1, why))  # type: ignore[arg-type]
    with pytest.raises(
        DivergedError, match=r"max_skipped_steps: 3\).*weights are those of step 3\n"
    ) as error:
        skipped.count(6, StepResult(torch.tensor(1.0), 1.0, 0.1, "spike"))
    assert "spikes.action=warn" in str(error.value)
    assert error.value.exit_status == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["spikes.action=rollback", "checkpoint.interval=0"], "checkpoint.interval: 0 saves none"),
        (["spikes.rerun=true"], "write run.deterministic: true"),
        (["spikes.min_steps=200"], "spikes.min_steps: 128"),
        (["spikes.action=skip", "train.gradient_release=true"], "write spikes.action: rollback"),
        (["engine=deepspeed", "parallel.zero=1", "spikes.action=skip"], "write spikes.action: warn"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(overrides)
