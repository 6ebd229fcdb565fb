"""Which linears multiply in FP8, and why the others do not.

Every linear of the model is either converted or listed with a reason; nothing is left out silently.
Embedding, head and norms are never in the plan (Peng et al. 2023, and every recipe since, keep them in high
precision).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fp8train.config.errors import ConfigError
from fp8train.config.gemm_schema import GemmConfig, QuantConfig
from fp8train.kernels.gemm import GemmBackend
from fp8train.layers.linear import Fp8Plan, Linear
from fp8train.numerics.formats import format_by_name
from fp8train.numerics.quant_spec import LinearQuant, QuantSpec


@dataclass(frozen=True)
class PlanReport:
    """What was converted, in the whole model.

    Attributes:
        converted: module paths in FP8.
        skipped: reason -> module paths in high precision.
        held: those of ``converted`` that this process holds.
    """

    converted: tuple[str, ...]
    skipped: Mapping[str, tuple[str, ...]]
    held: tuple[str, ...]

    @property
    def total(self) -> int:
        """Linears of the model, the head included."""
        return len(self.converted) + sum(map(len, self.skipped.values()))

    def __str__(self) -> str:
        line = f"FP8: {len(self.converted)} of {self.total} linears"
        if self.skipped:
            reasons = ", ".join(f"{reason}: {len(paths)}" for reason, paths in self.skipped.items())
            line += f"; skipped {self.total - len(self.converted)} ({reasons})"
        return line


def quant_spec(config: QuantConfig) -> QuantSpec:
    """The numeric spec of one operand's configuration."""
    return QuantSpec(
        format_by_name(config.format),
        config.granularity,
        config.scale_source,
        config.power_of_two,
        config.margin,
        config.history,
        config.reduce,
        config.interval,
        config.constant_exponent,
        config.rounding,
        config.hadamard,
    )


def linear_quant(gemm: GemmConfig) -> LinearQuant:
    """The numeric plan of a linear. ``ConfigError`` where the operands do not fit together."""
    try:
        return LinearQuant(
            output_x=quant_spec(gemm.output.x),
            output_w=quant_spec(gemm.output.w),
            grad_input_grad_output=quant_spec(gemm.grad_input.grad_output),
            grad_input_w=quant_spec(gemm.grad_input.w),
            grad_weight_grad_output=quant_spec(gemm.grad_weight.grad_output),
            grad_weight_x=quant_spec(gemm.grad_weight.x),
            keep_x=gemm.keep_x,
            keep_w=gemm.keep_w,
            fast_accumulation=gemm.fast_accumulation,
            grad_weight_fp8=gemm.grad_weight.fp8,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def apply_fp8_plan(
    linears: Mapping[str, Linear],
    gemm: GemmConfig,
    backend: GemmBackend,
    *,
    num_layers: int,
    all_linears: Mapping[str, Linear] | None = None,
) -> PlanReport:
    """Convert what ``gemm`` selects.

    Args:
        linears: hidden linears by module path (``layers.{i}....``).
        gemm: ``precision.gemm`` with ``fp8: true``.
        backend: how FP8 GEMMs run here.
        num_layers: L, for ``last_layers_bf16``.
        all_linears: those of the whole model, if ``linears`` are a part of them; only looked at.

    Raises:
        ConfigError: an ``exclude`` pattern matches nothing, or nothing is left to convert.
    """
    plan = Fp8Plan(linear_quant(gemm), backend)
    whole = linears if all_linears is None else all_linears
    for pattern in gemm.exclude:
        if not any(_matches(path, pattern) for path in whole):
            raise ConfigError(
                f"precision.gemm.exclude: {pattern!r} matches no linear; paths look like {next(iter(whole))}"
            )
    converted: list[str] = []
    skipped: dict[str, list[str]] = {}
    for path, linear in whole.items():
        reason = _reason_to_skip(path, linear, gemm, num_layers)
        if reason is None:
            converted.append(path)
        else:
            skipped.setdefault(reason, []).append(path)
    skipped["head"] = ["head"]
    if not converted:
        raise ConfigError(
            "precision.gemm.fp8 is true but every linear is excluded; relax exclude/min_dim/*_layers_bf16"
        )
    held = tuple(path for path in converted if path in linears)
    for path in held:
        linears[path].use_fp8(plan)
    return PlanReport(
        tuple(converted), {reason: tuple(paths) for reason, paths in skipped.items()}, held=held
    )


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path + ".weight", pattern)


def _reason_to_skip(path: str, linear: Linear, gemm: GemmConfig, num_layers: int) -> str | None:
    layer = int(path.split(".")[1])
    if layer < gemm.first_layers_bf16 or layer >= num_layers - gemm.last_layers_bf16:
        return "first/last layers"
    if any(_matches(path, pattern) for pattern in gemm.exclude):
        return "exclude"
    if gemm.min_dim is not None and min(linear.in_features, linear.out_features) < gemm.min_dim:
        return f"dimension < {gemm.min_dim}"
    return None
