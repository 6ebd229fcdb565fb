"""Which linears multiply in FP8, from the configuration alone: their paths and who is left out.

The model itself has the last word (:mod:`fp8train.models.fp8_plan`); a test compares the two. Known here, so
that a pattern without a match is told before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fp8train.config.layout import LayoutProblem

if TYPE_CHECKING:
    from fp8train.config.schema import Config

LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
"""Of every block."""


def linear_paths(num_layers: int) -> list[str]:
    """Paths of the linears of all layers, in order."""
    return [f"layers.{layer}.{name}" for layer in range(num_layers) for name in LINEARS]


def matches(path: str, pattern: str) -> bool:
    """Whether an entry of ``precision.gemm.exclude`` names the linear at ``path``."""
    return fnmatchcase(path, pattern) or fnmatchcase(path + ".weight", pattern)


def exclusion_problems(config: Config) -> Iterator[LayoutProblem]:
    """Patterns that match no linear, and FP8 GEMMs of which none is left."""
    gemm, layers = config.precision.gemm, config.model.num_layers
    if not gemm.fp8:
        return
    paths = linear_paths(layers)
    for pattern in gemm.exclude:
        if not any(matches(path, pattern) for path in paths):
            yield LayoutProblem(
                f"precision.gemm.exclude: {pattern!r} matches no linear; paths look like {paths[0]}, up to "
                f"{paths[-1]}",
                ("precision.gemm.exclude",),
            )
    inner = paths[gemm.first_layers_bf16 * len(LINEARS) : (layers - gemm.last_layers_bf16) * len(LINEARS)]
    if gemm.last_layers_bf16 >= layers or all(
        any(matches(path, pattern) for pattern in gemm.exclude) for path in inner
    ):
        yield LayoutProblem(
            f"precision.gemm.fp8 is true but every linear is excluded; relax exclude/min_dim/*_layers_bf16 "
            f"(model.num_layers is {layers}), or write precision.gemm.fp8=false",
            (
                "precision.gemm.exclude",
                "precision.gemm.first_layers_bf16",
                "precision.gemm.last_layers_bf16",
            ),
        )
