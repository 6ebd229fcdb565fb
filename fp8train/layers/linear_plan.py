"""How a linear runs: the frozen values that its calls depend on besides tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8train.kernels.gemm_choice import GemmBackend
from fp8train.layers.fp8_operand import Caster
from fp8train.layers.wire import Wire
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.operand_cast import QuantSpec

Holding = Literal["cached", "in_forward", "at_use", "resident", "loaded"]
"""How a linear in FP8 has its weight: in the compute type with FP8 copies of it, cast when it changed; in the
compute type alone, cast in every forward times factors per column; in the compute type, and that only while
its module runs, cast in every forward and again in backward; in FP8 alone, written by the optimizer; in FP8
alone, cast once from a checkpoint, for a model without backward."""


@dataclass(frozen=True)
class Alphas:
    """Multipliers of the three GEMMs; a parametrisation sets them, standard training leaves them at 1.

    ``grad_bias`` multiplies the gradient of the bias, which is added after the multiplication.
    """

    output: float = 1.0
    grad_input: float = 1.0
    grad_weight: float = 1.0
    grad_bias: float = 1.0


@dataclass(frozen=True)
class Fp8Plan:
    """How one linear runs in FP8: the quantisation of its operands, the GEMM implementation, how it has its
    weight, and who casts in place of our own functions."""

    quant: LinearQuant
    backend: GemmBackend
    holding: Holding = "cached"
    caster: Caster | None = None


def scale_slots(name: str, plan: Fp8Plan) -> dict[str, QuantSpec]:
    """``{slot name: spec}`` of the delayed casts of the linear of this name, ``{name}/{use}``: what a
    :class:`~fp8train.numerics.scale_state.ScaleState` is made of."""
    casts = plan.quant.casts().items()
    return {f"{name}/{use}": spec for use, spec in casts if spec.scale_source == "delayed"}


@dataclass(frozen=True)
class LinearCall:
    """What a forward call depends on besides tensors, for the autograd functions.

    Attributes:
        alphas: multipliers of the GEMMs.
        plan: None in high precision.
        sink: number of the gradient sink; without meaning where the call has no buffer.
        wire: communication with tensor-parallel ranks.
        batch: sequences in the input.
        trains: whether there will be a backward, which reads codes in another layout.
    """

    alphas: Alphas
    plan: Fp8Plan | None
    sink: int
    wire: Wire  # no default: torch 2.11 cannot trace one that is an object
    batch: int = 1
    trains: bool = True
