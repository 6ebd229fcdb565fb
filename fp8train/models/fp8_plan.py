"""Which linears multiply in FP8 and how they have their weights, and why the others do not.

Every linear of the model is either in the plan or listed with a reason; nothing is left out silently. This is
a decision and changes nothing: :mod:`fp8train.models.connect` carries it out. Embedding, head and norms are
never in the plan (Peng et al. 2023, and every recipe since, keep them in high precision). A head that
multiplies in FP8 (``precision.gemm.head``) is among the reasons, but has no plan: its gradient and states are
not the plan's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp8train.config.linear_names import coverage, linears_in_fp8, reasons_to_skip
from fp8train.config.precision_schema import PrecisionConfig
from fp8train.config.schema import Config
from fp8train.kernels.gemm_choice import GemmBackend
from fp8train.layers.fp8_operand import Caster
from fp8train.layers.linear_plan import Fp8Plan, Holding


@dataclass(frozen=True)
class PlanReport:
    """The FP8 plan of the whole model: which linears run in FP8, and why the others do not.

    Attributes:
        plans: how each linear in FP8 runs, by module path.
        reasons: why a linear is in high precision, None of those in FP8; by module path, the head included.
        backend: how FP8 GEMMs run here.
        native: module paths of the linears that are Transformer Engine's own; they have no plan of ours.
    """

    plans: Mapping[str, Fp8Plan]
    reasons: Mapping[str, str | None]
    backend: GemmBackend
    native: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[str, ...]:
        """Module paths of the linears that run in FP8 by a plan, in order."""
        return tuple(self.plans)

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Module paths in high precision by reason."""
        found: dict[str, list[str]] = {}
        for path, reason in self.reasons.items():
            if reason is not None:
                found.setdefault(reason, []).append(path)
        return found

    def __str__(self) -> str:
        return coverage(self.reasons)


def plan_fp8(
    config: Config,
    backend: GemmBackend,
    *,
    caster: Caster | None = None,
    forward_only: bool = False,
    partitioned: bool = False,
) -> PlanReport:
    """Decide how each linear that ``precision.gemm`` selects has its weight.

    Args:
        config: with ``precision.gemm.fp8: true``.
        backend: how FP8 GEMMs run here.
        caster: who casts operands in place of our own functions.
        forward_only: the weights come from a checkpoint and nothing trains them.
        partitioned: parameters have values only while their modules run, as under ZeRO-3.
    """
    precision, quant = config.precision, config.precision.gemm.value()
    assert quant is not None
    reasons = reasons_to_skip(config.model, precision.gemm)
    if backend.name == "te_native":
        return PlanReport({}, reasons, backend, tuple(linears_in_fp8(config)))
    plans = {
        path: Fp8Plan(
            quant,
            backend,
            _holding(path, precision, forward_only=forward_only, partitioned=partitioned),
            caster,
        )
        for path in linears_in_fp8(config)
    }
    assert plans, "the configuration knows which linears are left (config/linear_names.py)"
    return PlanReport(plans, reasons, backend)


def _holding(path: str, precision: PrecisionConfig, *, forward_only: bool, partitioned: bool) -> Holding:
    """Smooth-SwiGLU's factors of channels are those of a micro-batch, so its weights are cast with them."""
    if partitioned:
        assert precision.weights != "fp8", "an FP8 weight that the optimizer writes is whole on every rank"
        return "at_use"
    if precision.gemm.smooth_swiglu == "channel" and path.endswith(".mlp.down"):
        return "in_forward"
    if forward_only:
        return "loaded"
    return "resident" if precision.weights == "fp8" else "cached"
