"""The sampling filters against plain loops over sorted lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fp8train.inference.errors import InferenceError
from fp8train.inference.sampling import Sampling, probabilities, sample


def brute_force(row: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Token by token, straight from the definition."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    kept = order if top_k is None else order[:top_k]
    weights = {i: math.exp((row[i] - row[order[0]]) / temperature) for i in kept}
    if top_p is not None:
        total, mass, nucleus = sum(weights.values()), 0.0, {}
        for i in kept:
            if nucleus and mass >= top_p:
                break
            nucleus[i] = weights[i]
            mass += weights[i] / total
        weights = nucleus
    return [weights.get(i, 0.0) / sum(weights.values()) for i in range(len(row))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 20, 100])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.1, 0.6, 0.95, 1.0])
def test_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = 3 * torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    found = probabilities(logits, Sampling(temperature, top_k, top_p))
    for row, expected in zip(logits.tolist(), found.tolist(), strict=True):
        assert expected == pytest.approx(brute_force(row, temperature, top_k, top_p), abs=1e-12)


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 5.0]])
    generator = torch.Generator().manual_seed(2)
    before = generator.get_state()
    assert sample(logits, Sampling(temperature=0.0), generator).tolist() == [1, 0]
    assert torch.equal(generator.get_state(), before)
    assert probabilities(logits, Sampling(temperature=0.0)).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_tiny_temperature_does_not_overflow() -> None:
    chances = probabilities(torch.tensor([[1e4, 1e4 - 1, -1e4]]), Sampling(temperature=1e-300))
    assert chances.tolist() == [[1.0, 0.0, 0.0]]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = Sampling(temperature=0.8, top_k=3, top_p=0.99)
    draws = sample(logits.expand(20000, 4), sampling, torch.Generator().manual_seed(3))
    observed = draws.bincount(minlength=4) / 20000
    expected = brute_force(logits.tolist(), 0.8, 3, 0.99)
    assert observed.tolist() == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(20000))
    assert observed[3] == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 1.5}, r"top_p 1\.5"),
        ({"top_p": -0.5}, r"top_p -0\.5"),
    ],
)
def test_settings_outside_their_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InferenceError, match=named):
        Sampling(**settings)
