"""Which linears multiply in FP8, from the configuration alone: their paths and who is left out.

The model makes its plan from what it holds (:mod:`fp8train.models.fp8_plan`); a test compares the two. Known
here, so that a pattern without a match is told before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from fp8train.config.all_sections import AllSections
from fp8train.config.gemm_schema import GemmConfig
from fp8train.config.layout import LayoutProblem
from fp8train.config.model_schema import ModelConfig

LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
"""Of every block."""


def linear_paths(num_layers: int) -> list[str]:
    """Paths of the linears of all layers, in order."""
    return [f"layers.{layer}.{name}" for layer in range(num_layers) for name in LINEARS]


def _dimensions(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each of a block's linears, whole."""
    heads, gated = model.num_heads * model.head_dim, 2 if model.activation == "swiglu" else 1
    return {
        "attention.qkv": (model.hidden_size, heads + 2 * model.num_kv_heads * model.head_dim),
        "attention.out": (heads, model.hidden_size),
        "mlp.up": (model.hidden_size, gated * model.ffn_hidden_size),
        "mlp.down": (model.ffn_hidden_size, model.hidden_size),
    }


def linears_in_fp8(model: ModelConfig, gemm: GemmConfig) -> list[str]:
    """Paths of the linears that ``precision.gemm`` selects."""
    wide = [
        name for name, size in _dimensions(model).items() if gemm.min_dim is None or min(size) >= gemm.min_dim
    ]
    layers = range(gemm.first_layers_bf16, model.num_layers - gemm.last_layers_bf16)
    paths = (f"layers.{layer}.{name}" for layer in layers for name in wide)
    return [path for path in paths if not any(matches(path, pattern) for pattern in gemm.exclude)]


def matches(path: str, pattern: str) -> bool:
    """Whether an entry of ``precision.gemm.exclude`` names the linear at ``path``."""
    return fnmatchcase(path, pattern) or fnmatchcase(path + ".weight", pattern)


def exclusion_problems(config: AllSections) -> Iterator[LayoutProblem]:
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
    left = linears_in_fp8(config.model, gemm)
    if not left:
        yield LayoutProblem(
            f"precision.gemm.fp8 is true but every linear is excluded; relax exclude/min_dim/*_layers_bf16 "
            f"(model.num_layers is {layers}), or write precision.gemm.fp8=false",
            (
                "precision.gemm.exclude",
                "precision.gemm.first_layers_bf16",
                "precision.gemm.last_layers_bf16",
                "precision.gemm.min_dim",
            ),
        )
    elif gemm.smooth_swiglu != "off" and not any(path.endswith(".mlp.down") for path in left):
        yield LayoutProblem(
            "precision.gemm.smooth_swiglu is about down projections in FP8, but all of them are left in high "
            "precision (precision.gemm.exclude, which recipe: umup fills; or min_dim); remove one of the two",
            ("precision.gemm.smooth_swiglu", "precision.gemm.exclude", "precision.gemm.min_dim"),
        )
