"""How a linear runs: what its calls depend on besides tensors."""

from __future__ import annotations

from dataclasses import dataclass

from fp8train.kernels.gemm import GemmBackend
from fp8train.layers.wire import UNSPLIT, Wire
from fp8train.numerics.quant_spec import LinearQuant


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
    """How one linear runs in FP8: the quantisation of its operands and the GEMM implementation."""

    quant: LinearQuant
    backend: GemmBackend


@dataclass(frozen=True)
class LinearCall:
    """Everything of a forward call that is not a tensor, for the autograd functions.

    Attributes:
        alphas: multipliers of the GEMMs.
        plan: None in high precision.
        sink: number of the gradient sink; without meaning where the call has no buffer.
        wire: communication with tensor-parallel ranks.
        batch: sequences in the input.
    """

    alphas: Alphas
    plan: Fp8Plan | None
    sink: int
    wire: Wire = UNSPLIT
    batch: int = 1
