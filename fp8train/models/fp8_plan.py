"""Which linears multiply in FP8 and how they have their weights, and why the others do not.

Every linear of the model is either in the plan or listed with a reason; nothing is left out silently. This is
a decision and changes nothing: :mod:`fp8train.models.connect` carries it out. Embedding, head and norms are
never in the plan (Peng et al. 2023, and every recipe since, keep them in high precision).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fp8train.config.linear_names import coverage, reason_to_skip
from fp8train.config.precision_schema import PrecisionConfig
from fp8train.kernels.gemm import GemmBackend
from fp8train.layers.linear import Linear
from fp8train.layers.linear_plan import Fp8Plan, Holding, scale_slots
from fp8train.precision.operand_cast import QuantSpec


@dataclass(frozen=True)
class PlanReport:
    """The FP8 plan of the whole model: which linears run in FP8, and why the others do not.

    Attributes:
        plans: how each linear in FP8 runs, by module path.
        skipped: reason -> module paths in high precision.
        held: paths of ``plans`` that this process holds.
    """

    plans: Mapping[str, Fp8Plan]
    skipped: Mapping[str, tuple[str, ...]]
    held: tuple[str, ...]

    @property
    def converted(self) -> tuple[str, ...]:
        """Module paths of the linears that run in FP8, in order."""
        return tuple(self.plans)

    @property
    def total(self) -> int:
        """Number of linears of the model, the head included."""
        return len(self.converted) + sum(map(len, self.skipped.values()))

    def scale_slots(self) -> dict[str, QuantSpec]:
        """``{slot name: spec}`` of all delayed casts of the linears that this process holds."""
        return {
            slot: spec for path in self.held for slot, spec in scale_slots(path, self.plans[path]).items()
        }

    def __str__(self) -> str:
        return coverage(len(self.plans), {reason: len(paths) for reason, paths in self.skipped.items()})


def plan_fp8(
    linears: Mapping[str, Linear],
    precision: PrecisionConfig,
    backend: GemmBackend,
    *,
    num_layers: int,
    held: Collection[str] | None = None,
    forward_only: bool = False,
) -> PlanReport:
    """Decide which linears ``precision.gemm`` selects, and how each of those has its weight.

    Args:
        linears: hidden linears of the whole model by module path (``layers.{i}....``); only looked at.
        precision: with ``gemm.fp8: true``.
        backend: how FP8 GEMMs run here.
        num_layers: L, for ``last_layers_bf16``.
        held: paths of those that this process holds; None for all.
        forward_only: the weights come from a checkpoint and nothing trains them.
    """
    gemm, quant = precision.gemm, precision.gemm.value()
    assert quant is not None
    plans: dict[str, Fp8Plan] = {}
    skipped: dict[str, list[str]] = {}
    for path, linear in linears.items():
        dimensions = linear.in_features, linear.out_features
        reason = reason_to_skip(path, dimensions, gemm, num_layers=num_layers)
        if reason is None:
            plans[path] = Fp8Plan(quant, backend, _holding(path, precision, forward_only=forward_only))
        else:
            skipped.setdefault(reason, []).append(path)
    skipped["head"] = ["head"]
    assert plans, "the configuration knows which linears are left (config/linear_names.py)"
    return PlanReport(
        plans,
        {reason: tuple(paths) for reason, paths in skipped.items()},
        held=tuple(path for path in plans if held is None or path in held),
    )


def _holding(path: str, precision: PrecisionConfig, *, forward_only: bool) -> Holding:
    """Smooth-SwiGLU's factors of channels are those of a micro-batch, so its weights are cast with them."""
    if precision.gemm.smooth_swiglu == "channel" and path.endswith(".mlp.down"):
        return "in_forward"
    if forward_only:
        return "loaded"
    return "resident" if precision.weights == "fp8" else "cached"
