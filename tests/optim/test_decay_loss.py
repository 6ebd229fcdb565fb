"""What the run says about lost weight decay, against AdamW itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fp8train.optim.decay_loss import explain_lost_decay, half_units
from fp8train.optim.gradient import TensorGradient
from fp8train.optim.optimizer import Optimizer
from fp8train.precision.state_formats import StateFormat, StateFormats
from fp8train.update_rules.adamw import AdamW, AdamWSettings
from tests.optim.test_adamw import spec

SHAPE = (16, 256)
F = StateFormat


def decay_kept(fmt: StateFormat, decay: float, *, steps: int, gradients: float, std: float = 1.0) -> float:
    """Share of ``steps`` decays that reached the weights: what decay changes, along the start."""
    lr, ends = 3e-4, []
    for weight_decay in (decay / lr, 0.0):
        torch.manual_seed(0)
        start = torch.randn(SHAPE) * std
        settings = AdamWSettings(lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay)
        specs = {"w": spec("w", SHAPE, in_fp8_plan=True)}
        parameters = {"w": nn.Parameter(torch.zeros(SHAPE))}
        optimizer = Optimizer(AdamW(settings), parameters, specs, StateFormats(fmt), seed=0)
        optimizer.states.seed_master("w", start)
        for step in range(1, steps + 1):
            reader = TensorGradient(gradients * torch.randn(SHAPE))
            one = torch.tensor(1.0)
            optimizer.step(lambda _, r=reader: r, step=step, lr_factor=1.0, grad_multiplier=one)
        assert optimizer.peak_decay(specs["w"]) == pytest.approx(decay if weight_decay else 0.0)
        ends.append(optimizer.states.master("w").double())
    start = start.double()
    return float(((ends[1] - ends[0]) * start).sum() / start.square().sum()) / (1 - (1 - decay) ** steps)


CASES = {
    # a format, decays below, within and above its half units
    "fp16": (F("fp16_scaled"), (2.0**-12.1, 2.0**-11.5, 2.0**-10.9)),
    "fp16 of the paper": (F("fp16_scaled", granularity="tensor"), (2.0**-12.1, 2.0**-11.5, 2.0**-10.9)),
    "bf16": (F("bf16"), (2.0**-9.1, 2.0**-8.5, 2.0**-7.9)),
    "e4m3": (F("e4m3"), (2.0**-5.1, 2.0**-4.5, 2.0**-3.9)),
}


@pytest.mark.parametrize("case", CASES)
def test_decay_alone(case: str) -> None:
    """One step without gradients: none of the weights moves, some, or all (but for subnormal ones)."""
    fmt, (below, within, above) = CASES[case]
    moved = []
    for decay in (below, within, above):
        settings = AdamWSettings(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=decay / 1e-3)
        specs = {"w": spec("w", SHAPE, in_fp8_plan=True)}
        parameters = {"w": nn.Parameter(torch.zeros(SHAPE))}
        optimizer = Optimizer(AdamW(settings), parameters, specs, StateFormats(fmt), seed=0)
        torch.manual_seed(1)
        optimizer.states.seed_master("w", torch.randn(SHAPE).sign() * (0.5 + torch.rand(SHAPE)))
        before = optimizer.states.master("w").clone()
        reader, one = TensorGradient(torch.zeros(SHAPE)), torch.tensor(1.0)
        optimizer.step(lambda _, r=reader: r, step=1, lr_factor=1.0, grad_multiplier=one)
        moved.append(float((optimizer.states.master("w") != before).float().mean()))
    assert moved[0] == 0.0
    assert 0.1 < moved[1] < 0.9
    assert moved[2] == 1.0
    words = [explain_lost_decay(fmt, [decay]) for decay in (below, within, above)]
    assert words[2] is None
    for text, verdict in zip(words[:2], ("moves no weight", "moves only some weights"), strict=True):
        assert text is not None
        assert verdict in text


@pytest.mark.parametrize("name", ["fp16_scaled", "bf16"])
def test_the_remedy_keeps_it(name: Any) -> None:
    """Fifty steps at FP8-LM's rate and λ: nearest loses all of it, stochastic rounding nothing."""
    decay = 3e-4 * 0.1
    assert decay_kept(F(name), decay, steps=50, gradients=0.0) == 0.0
    stochastic = F(name, rounding="stochastic")
    assert decay_kept(stochastic, decay, steps=50, gradients=0.0) == pytest.approx(1.0, abs=0.25)
    assert explain_lost_decay(stochastic, [decay]) is None


def test_larger_updates_carry_it_along() -> None:
    """Why the message says "by itself": updates of 20 units are a dither, those of a third of one are not."""
    assert decay_kept(F("fp16_scaled"), 3e-5, steps=50, gradients=1.0, std=0.02) == pytest.approx(1, abs=0.1)
    assert decay_kept(F("fp16_scaled"), 3e-5, steps=50, gradients=1.0, std=4.0) == pytest.approx(0, abs=0.1)


def test_nothing_is_said_where_nothing_is_lost() -> None:
    for fmt in (F("fp32"), F("bf16_remainder"), F("e4m3", expand=True), F("bf16", rounding="stochastic")):
        assert half_units(fmt) is None
        assert explain_lost_decay(fmt, [1e-9]) is None
    assert explain_lost_decay(F("bf16"), []) is None
    assert explain_lost_decay(F("bf16"), [0.0]) is None  # nobody asked for decay
    assert explain_lost_decay(F("bf16"), [0.01]) is None


def test_rates_that_differ_are_told_as_a_range() -> None:
    text = explain_lost_decay(F("fp16_scaled"), [3e-5, 1e-4, 0.0])
    assert text is not None
    assert "removes 3e-05 to 0.0001 of a weight" in text
    assert "0.00024 to 0.00049 of it (needed: 0.00024)" in text
