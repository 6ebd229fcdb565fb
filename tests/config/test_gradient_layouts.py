"""Gradient reductions that a layout cannot do are refused when the configuration is read."""

from __future__ import annotations

import re

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.layout import layout_problems
from tests.distributed.test_tensor_parallel import WIDE
from tests.training.tiny import tiny_config

EXACT = ["precision.gradient.fp8.reduce=exact", "run.threads=1"]
O2 = ["precision.level=O2", "model.tie_embeddings=true"]
REFUSED = {
    "exact sums of a tied embedding's two gradients": (
        [*O2, *EXACT, "parallel.pp=2"],
        "tied embedding's alone; write model.tie_embeddings: false, or another reduction",
    ),
    "exact sums without what fixes the bits on any device": (
        [*O2, "precision.gradient.fp8.reduce=exact"],
        "on a CPU equal threads per rank: set run.threads, for example run.threads=1; on CUDA kernels whose "
        "result does not depend on timing: set run.deterministic=true",
    ),
    "exact sums on a CPU without threads": (
        [*O2, "precision.gradient.fp8.reduce=exact", "run.device=cpu", "run.deterministic=true"],
        "only with equal threads per rank: set run.threads",
    ),
    "exact sums in E5M2": (
        [*O2, *EXACT, "precision.gradient.format=e5m2"],
        "counts in units of E4M3, but format is e5m2; write format: e4m3",
    ),
    "exact sums of too many micro-batches": (
        [*O2, *EXACT, "train.global_batch_size=16384"],
        "exact adds at most 9362 micro-batches a step in INT32; train.global_batch_size (16384) of "
        "train.micro_batch_size (1) are 16384; raise train.micro_batch_size",
    ),
    "nodes that no number of ranks divides into": (
        [*O2, "precision.gradient.fp8.node_size=3"],
        "node_size (3) must divide the data-parallel ranks: at most 8, for a step has 8 micro-batches to "
        "share; legal: 1, 2, 4 or 8",
    ),
    "nodes that the ranks do not divide into": (
        [*O2, "precision.gradient.fp8.node_size=4", "parallel.dp=2"],
        "node_size (4) must divide the data-parallel ranks: parallel.dp * cp = 2; legal: 1 or 2",
    ),
    "NCCL's sum on a CPU": (
        [
            *O2,
            "precision.gradient.fp8.reduce=shared_scale",
            "precision.gradient.fp8.sum=native",
            "run.device=cpu",
        ],
        "sum: native is NCCL's and needs CUDA, but run.device is cpu; write ring or tree",
    ),
}
ALLOWED = {
    "shared scales of parts": [*O2, "precision.gradient.fp8.reduce=shared_scale", "parallel.tp=2"],
    "the paper's profile on parts": [*O2, "precision.profile=paper", "parallel.tp=2"],
    "exact sums of parts": [*O2, *EXACT, "parallel.tp=2"],
    "gradients in high precision are never cast": [
        *("precision.gemm.fp8=true", "precision.profile=paper", "parallel.tp=2"),
    ],
    "the paper's profile with another reduction": [
        *(*O2, "precision.profile=paper", "precision.gradient.fp8.reduce=exchange", "parallel.tp=2"),
    ],
    "whole tensors on every stage": [*O2, "precision.gradient.fp8.reduce=shared_scale", "parallel.pp=2"],
    "exact with two tensors": [
        *("precision.level=O2", *EXACT, "parallel.pp=2"),
        "model.tie_embeddings=false",
    ],
    "exact over data-parallel ranks": [*O2, *EXACT],
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_reduction_that_the_layout_cannot_do_is_refused(name: str) -> None:
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny_config(overrides, **WIDE)


@pytest.mark.parametrize("name", list(ALLOWED))
def test_others_are_not(name: str) -> None:
    assert not list(layout_problems(tiny_config(ALLOWED[name], **WIDE)))
