"""What a sampled step adds to the records: rows of gradient casts, shares that optimizer states lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8train.step.trainer import Trainer
from tests.parallel.gradients.reading import gradient_of
from tests.training.launching import finish, start, write_config
from tests.training.tiny import VOCAB, alone, batches, tiny_config

REDUCTIONS = {
    "exchange": [],
    "shared_scale": ["precision.profile=paper"],
    "exact": ["precision.gradient.fp8.reduce=exact", "run.threads=1"],
    "bf16": ["precision.gradient.fp8.reduce=bf16"],
}
# A square has twice the binades of its root: blocks of E4M3 flush some of any gradient's.
FLUSHING = ["precision.gradient.format=high_precision", "precision.state.exp_avg_sq.format=e4m3"]


def sampled_trainer(*overrides: str) -> Trainer:
    """After one step of which statistics were taken."""
    config = tiny_config(["precision.level=O2", "logging.cast_statistics_interval=1", *overrides])
    trainer = Trainer(config, alone(), vocab_size=VOCAB)
    assert trainer.monitors.recorder is not None
    trainer.monitors.recorder.active = True
    trainer.step(0, batches(config, alone()).batch(0))
    return trainer


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_linear_in_the_plan_has_a_row_of_its_gradient(reduction: str) -> None:
    trainer = sampled_trainer(*REDUCTIONS[reduction])
    assert trainer.monitors.recorder is not None
    assert trainer.built.fp8 is not None
    rows = trainer.monitors.recorder.collect()
    paths = trainer.built.fp8.converted
    assert {site for site in rows if site.endswith("/grad_weight")} == {f"{p}/grad_weight" for p in paths}
    for path in paths:
        row = rows[f"{path}/grad_weight"]
        assert 20 < row["snr_db"] < 45, (path, row)
        if reduction != "exact":  # whose row is of one micro-batch
            stored = float(gradient_of(trainer.store, f"{path}.weight").abs().max())
            assert row["amax"] == pytest.approx(stored, rel=2**-4)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_flushed_shares_are_those_of_the_states(clip: float) -> None:
    """After one step the moments are shares of the clipped gradient and its square."""
    trainer = sampled_trainer(
        f"optimizer.clip_grad_norm={clip}", "optimizer.beta1=0.9", "optimizer.beta2=0.95", *FLUSHING
    )
    assert trainer.built.fp8 is not None
    norm = float(trainer.store.global_norm())
    multiplier = min(1.0, clip / norm) if clip else 1.0
    flushed, total = {"exp_avg": 0, "exp_avg_sq": 0}, 0
    for path in trainer.built.fp8.converted:
        gradient = gradient_of(trainer.store, f"{path}.weight").double() * multiplier
        total += gradient.numel()
        for role, new in (("exp_avg", 0.1 * gradient), ("exp_avg_sq", 0.05 * gradient.square())):
            stored = trainer.optimizer.states.decoded(f"{path}.weight", role)
            flushed[role] += int(((stored == 0) & (new.float() != 0)).sum())
    metrics = trainer.monitors.optimizer_metrics(trainer.optimizer)
    assert flushed["exp_avg_sq"] > 10
    for role, count in flushed.items():
        assert metrics[f"optim/flushed_{role}"] == pytest.approx(count / total, rel=1e-6), role


def test_steps_that_are_not_sampled_count_nothing() -> None:
    trainer = sampled_trainer()
    assert trainer.monitors.recorder is not None
    trainer.monitors.recorder.active = False
    trainer.step(1, batches(trainer.config, alone()).batch(1))
    assert trainer.monitors.optimizer_metrics(trainer.optimizer) == {}


def test_a_run_records_both(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    overrides = ["precision.level=O2", "precision.gradient.fp8.reduce=exact", "run.name=run", FLUSHING[1]]
    finish(start(config, 1, *overrides, "train.steps=4", "logging.cast_statistics_interval=3"))
    rows = [json.loads(line) for line in (tmp_path / "run/casts.jsonl").read_text().splitlines()]
    sites = [(row["step"], row["site"]) for row in rows if row["site"].endswith("/grad_weight")]
    assert {step for step, _ in sites} == {1, 3}
    assert len(sites) == len(set(sites)) == 2 * sum(r["site"].endswith("/x") and r["step"] == 1 for r in rows)
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    shares = [row["optim/flushed_exp_avg_sq"] for row in metrics if "optim/grad_norm" in row]
    assert len(shares) == 4
    assert 0 < shares[0] < 0.5
    assert shares[0] == shares[1] != shares[2] == shares[3], f"{shares}: kept until the next sampled step"
    assert all("fp8/gradient_saturated_elements" in row for row in metrics if "optim/grad_norm" in row)
