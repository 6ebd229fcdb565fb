"""A norm inside a fused function: the residual sum before it, and its result as the source of an operand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp8train.kernels.norms import Kind, NormOutput, norm_again, norm_backward, norm_cast, residual_norm
from fp8train.kernels.operands import CastOperand
from fp8train.layers.fused_linear import Source
from fp8train.layers.gradient_amax import GradientAmax


@dataclass(frozen=True)
class FusedNorm:
    """What a norm's share of a fused function depends on besides tensors.

    Attributes:
        kind: RMSNorm or LayerNorm.
        eps: added to the variance.
        gain_grad: multiplies the gradients of weight and bias.
        casts: whether the result becomes an FP8 operand; else it is written in the stream's dtype.
    """

    kind: Kind
    eps: float
    gain_grad: float
    casts: bool

    def forward(
        self, x: Tensor, delta: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[NormOutput, Source]:
        """Add ``delta`` to the stream x, [T, H] each, and normalise; the result as a source."""
        out = residual_norm(
            x,
            delta,
            weight,
            bias,
            eps=self.eps,
            kind=self.kind,
            want_y=not self.casts,
            want_partials=self.casts,
        )
        return out, self._source(out, weight, bias)

    def again(
        self, stream: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Source:
        """The result once more, of what backward kept; in high precision."""
        return Source.of_values(norm_again(stream, mean, rstd, weight, bias))

    @staticmethod
    def _source(out: NormOutput, weight: Tensor | None, bias: Tensor | None) -> Source:
        def cast(**how: object) -> CastOperand:
            return norm_cast(out.stream, out.mean, out.rstd, weight, bias, **how)  # type: ignore[arg-type]

        return Source(len(out.stream), lambda: out.y, lambda: out.partials, cast)

    def backward(
        self,
        grad_y: Tensor,
        grad_stream: Tensor | None,
        stream: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        delta_amax: GradientAmax | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of the stream (for x and delta both), the weight and the bias; ``delta_amax`` is told the
        amax of the first."""
        found = norm_backward(
            grad_y.contiguous(), grad_stream, stream, mean, rstd, weight, want_bias=bias is not None
        )
        if delta_amax is not None:
            delta_amax.put(found.stream, found.partials)
        grad_weight = None if weight is None else self._scaled(found.weight)
        return found.stream, grad_weight, None if bias is None else self._scaled(found.bias)

    def _scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.gain_grad == 1.0 else gradient * self.gain_grad
