"""What ``train.gradient_release`` cannot be together with is refused, with key, reason and remedy."""

from __future__ import annotations

import re

import pytest

from fp8train.config.changes import changes
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import resolve_mapping
from fp8train.config.schema import to_plain
from fp8train.config.world import check_world
from tests.config.examples import minimal

RELEASE = ["train.gradient_release=true", "optimizer.clip_grad_norm=0", "train.micro_batch_size=4"]
O2 = "precision.level=O2"
REFUSED = {
    "the default": (
        ["train.gradient_release=true"],
        "optimizer.clip_grad_norm: 1 needs the norm of all",
        "0",
    ),
    "a pipeline": (
        [*RELEASE, "parallel.pp=2"],
        "with parallel.pp: 2 they add up over the micro-batches of the pipeline",
        "1",
    ),
    "compiled blocks": (
        [*RELEASE, "train.compile=block"],
        "compiled blocks (train.compile: block) are told where each lies, alone",
        "off",
    ),
    "CUDA graphs": (
        [*RELEASE, "run.cuda_graphs=true"],
        "a CUDA graph (run.cuda_graphs) replays backward without the calls that update parameters",
        "false",
    ),
    "exact sums": (
        [*RELEASE, O2, "precision.gradient.fp8.reduce=exact", "run.threads=1"],
        "precision.gradient.fp8.reduce: exact runs a step again if some do not fit their grids",
        "exchange",
    ),
    "error feedback": (
        [*RELEASE, O2, "precision.gradient.fp8.error_feedback=true"],
        "precision.gradient.fp8.error_feedback keeps what was lost of each, 4 bytes a parameter",
        "false",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_is_refused(name: str) -> None:
    overrides, reason, value = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        resolve_mapping(minimal(), overrides)
    remedy = re.search(r"write ([a-z0-9_.]+): (\S+), or train.gradient_release: false", str(caught.value))
    assert remedy is not None and remedy[2] == value
    resolve_mapping(minimal(), [*overrides, f"{remedy[1]}={value}"])  # it would do


def test_accumulation_is_refused_where_the_ranks_are_known() -> None:
    resolved = resolve_mapping(minimal(), RELEASE)
    assert resolved.config.train.global_batch_size == 8
    assert check_world(resolved.config, 2) == (2, 1)
    with pytest.raises(ConfigError) as caught:
        check_world(resolved.config, 1, origins=resolved.origins)
    assert str(caught.value) == (
        "command line: train.gradient_release: true forgets gradients that are complete, but here they add "
        "up over 2 micro-batches, so none is before the last: write train.micro_batch_size: 8 or "
        "train.global_batch_size: 4, start 2 times the data-parallel ranks, or write train.gradient_release: "
        "false"
    )
    for remedy in ("train.micro_batch_size=8", "train.global_batch_size=4"):
        assert check_world(resolve_mapping(minimal(), [*RELEASE, remedy]).config, 1) == (1, 1)


def test_accumulation_that_the_file_shows_is_refused_there() -> None:
    with pytest.raises(ConfigError, match="they add up over 2 micro-batches"):
        resolve_mapping(minimal(), [*RELEASE, "parallel.dp=1"])


def test_a_run_goes_on_with_or_without() -> None:
    """Bits are the same, so it is no change of the training."""
    plain, released = (
        resolve_mapping(minimal(), [*RELEASE, f"train.gradient_release={value}"]).config
        for value in ("false", "true")
    )
    (change,) = changes(to_plain(plain), released)
    assert (change.key, change.kind) == ("train.gradient_release", "free")
