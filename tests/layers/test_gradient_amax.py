"""Partials of an amax reach only the gradient that they belong to."""

from __future__ import annotations

import torch

from fp8train.layers.gradient_amax import GradientAmax

PARTIALS = torch.tensor([3.0])


def put(gradient: torch.Tensor) -> GradientAmax:
    amax = GradientAmax()
    amax.put(gradient, PARTIALS)
    return amax


def test_the_same_memory_has_the_same_amax_once() -> None:
    gradient = torch.ones(4, 6)
    amax = put(gradient)
    assert amax.take(gradient.view(2, 12)) is PARTIALS
    assert amax.take(gradient) is None


def test_other_values_have_another() -> None:
    gradient = torch.ones(4, 6)
    assert put(gradient).take(gradient.clone()) is None
    assert put(gradient).take(gradient[:2]) is None
    assert put(gradient).take(gradient.t()) is None
    amax = put(gradient)
    gradient.view(-1).add_(1)
    assert amax.take(gradient) is None
    assert GradientAmax().take(gradient) is None
