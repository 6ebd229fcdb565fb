"""Which linears multiply in FP8, from the configuration alone: their paths and who is left out.

Known here, so that a pattern without a match is told before anything is built; the model's plan
(:mod:`fp8train.models.fp8_plan`) is made of the same answer.
"""

from __future__ import annotations

from collections import Counter
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


def reasons_to_skip(model: ModelConfig, gemm: GemmConfig) -> dict[str, str | None]:
    """Why ``precision.gemm``, with ``fp8: true``, leaves a linear in high precision; None if it multiplies in
    FP8. Of every linear by path, the head last."""
    sizes, layers = linear_dimensions(model), range(model.num_layers)

    def reason(layer: int, name: str) -> str | None:
        if not gemm.first_layers_bf16 <= layer < model.num_layers - gemm.last_layers_bf16:
            return "first/last layers"
        if any(matches(f"layers.{layer}.{name}", pattern) for pattern in gemm.exclude):
            return "exclude"
        if gemm.min_dim is not None and min(sizes[name]) < gemm.min_dim:
            return f"dimension < {gemm.min_dim}"
        return None

    found = {f"layers.{layer}.{name}": reason(layer, name) for layer in layers for name in LINEARS}
    return {**found, "head": None if gemm.head == "fp8" else "head"}


def linears_in_fp8(config: AllSections) -> list[str]:
    """Paths of the hidden linears that ``precision.gemm`` selects; none without FP8 GEMMs."""
    gemm = config.precision.gemm
    reasons = reasons_to_skip(config.model, gemm) if gemm.fp8 else {}
    return [path for path, reason in reasons.items() if reason is None and path != "head"]


def weights_in_fp8(config: AllSections) -> frozenset[str]:
    """Names of the matrices of :func:`linears_in_fp8`."""
    return frozenset(f"{path}.weight" for path in linears_in_fp8(config))


def coverage(reasons: Mapping[str, str | None]) -> str:
    """How many linears are in FP8, and how many are not for which reason, of :func:`reasons_to_skip`."""
    skipped = Counter(reason for reason in reasons.values() if reason is not None)
    left_out, total = skipped.total(), len(reasons)
    shown = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    skips = f"; skipped {left_out} ({shown})" if left_out else ""
    return f"FP8: {total - left_out} of {total} linears{skips}"


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
    left = linears_in_fp8(config)
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
