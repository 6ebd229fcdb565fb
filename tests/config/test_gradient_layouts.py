"""Gradient reductions that a layout cannot do are refused when the configuration is read."""

from __future__ import annotations

import re

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.layout import layout_problems
from tests.distributed.test_tensor_parallel import WIDE
from tests.training.tiny import tiny_config

O2 = ["precision.level=O2", "model.tie_embeddings=true"]
REFUSED = {
    "exact sums of a tied embedding's two gradients": (
        [*O2, "precision.gradient.fp8.reduce=exact", "parallel.pp=2"],
        "tied embedding's alone; write model.tie_embeddings: false, or another reduction",
    ),
}
ALLOWED = {
    "shared scales of parts": [*O2, "precision.gradient.fp8.reduce=shared_scale", "parallel.tp=2"],
    "the paper's profile on parts": [*O2, "precision.profile=paper", "parallel.tp=2"],
    "exact sums of parts": [*O2, "precision.gradient.fp8.reduce=exact", "parallel.tp=2"],
    "gradients in high precision are never cast": [
        *("precision.gemm.fp8=true", "precision.profile=paper", "parallel.tp=2"),
    ],
    "the paper's profile with another reduction": [
        *(*O2, "precision.profile=paper", "precision.gradient.fp8.reduce=exchange", "parallel.tp=2"),
    ],
    "whole tensors on every stage": [*O2, "precision.gradient.fp8.reduce=shared_scale", "parallel.pp=2"],
    "exact with two tensors": [
        *("precision.level=O2", "precision.gradient.fp8.reduce=exact", "parallel.pp=2"),
        "model.tie_embeddings=false",
    ],
    "exact over data-parallel ranks": [*O2, "precision.gradient.fp8.reduce=exact"],
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_reduction_that_the_layout_cannot_do_is_refused(name: str) -> None:
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny_config(overrides, **WIDE)


@pytest.mark.parametrize("name", list(ALLOWED))
def test_others_are_not(name: str) -> None:
    assert not list(layout_problems(tiny_config(ALLOWED[name], **WIDE)))
