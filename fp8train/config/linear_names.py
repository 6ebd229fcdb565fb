"""Which linears multiply in FP8, from the configuration alone: their paths and who is left out.

The model makes its plan from what it holds (:mod:`fp8train.models.fp8_plan`); a test compares the two. Known
here, so that a pattern without a match is told before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def linear_dimensions(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each of a block's linears, whole."""
    heads, gated = model.num_heads * model.head_dim, 2 if model.activation == "swiglu" else 1
    return {
        "attention.qkv": (model.hidden_size, heads + 2 * model.num_kv_heads * model.head_dim),
        "attention.out": (heads, model.hidden_size),
        "mlp.up": (model.hidden_size, gated * model.ffn_hidden_size),
        "mlp.down": (model.ffn_hidden_size, model.hidden_size),
    }


def reason_to_skip(
    path: str, dimensions: tuple[int, int], gemm: GemmConfig, *, num_layers: int
) -> str | None:
    """Why ``precision.gemm`` leaves a linear in high precision; None if it multiplies in FP8.

    Args:
        path: of the linear.
        dimensions: its inputs and outputs, whole.
        gemm: with ``fp8: true``.
        num_layers: of the model.
    """
    layer = int(path.split(".")[1])
    if not gemm.first_layers_bf16 <= layer < num_layers - gemm.last_layers_bf16:
        return "first/last layers"
    if any(matches(path, pattern) for pattern in gemm.exclude):
        return "exclude"
    if gemm.min_dim is not None and min(dimensions) < gemm.min_dim:
        return f"dimension < {gemm.min_dim}"
    return None


def reasons_to_skip(model: ModelConfig, gemm: GemmConfig) -> dict[str, str | None]:
    """:func:`reason_to_skip` of every linear but the head, by path."""
    sizes = linear_dimensions(model)
    return {
        path: reason_to_skip(path, sizes[path.split(".", 2)[2]], gemm, num_layers=model.num_layers)
        for path in linear_paths(model.num_layers)
    }


def linears_in_fp8(model: ModelConfig, gemm: GemmConfig) -> list[str]:
    """Paths of the linears that ``precision.gemm`` selects."""
    return [path for path, reason in reasons_to_skip(model, gemm).items() if reason is None]


def coverage(converted: int, skipped: Mapping[str, int]) -> str:
    """How many linears are in FP8, and how many are not for which reason."""
    left_out = sum(skipped.values())
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    return f"FP8: {converted} of {converted + left_out} linears; skipped {left_out} ({reasons})"


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
