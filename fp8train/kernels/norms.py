"""RMSNorm and LayerNorm with what stands around them: the sum with a branch before, an FP8 cast after.

A decoder's blocks alternate ``stream = stream + branch`` and ``y = norm(stream)``, and y is what a GEMM
multiplies. ``residual_norm`` does the sum, the statistics of each row and the amax of y in one pass over
memory; ``norm_cast`` computes y again from the statistics and casts it. Backward adds the gradient that
reaches the stream from elsewhere in the same pass.

With ``r = 1 / sqrt(mean((x - m)²) + eps)`` and ``n = (x - m)·r``, where m is the row's mean in a LayerNorm
and 0 in an RMSNorm: ``y = n·w + b``, ``grad_w = Σ g·n`` and ``grad_b = Σ g`` over rows, and
``grad_x = r·(g·w - mean(g·w) - n·mean(g·w·n))``, without the middle term in an RMSNorm. Statistics and sums
are in FP32 (FP64 for FP64); x, y and their gradients have x's dtype.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.kernels.operands import CastOperand, CastRule, count_of_partials
from fp8train.kernels.tiled import TiledValues
from fp8train.numerics.cast import amax_of

Kind = Literal["rms", "layer"]
MOST_SUMS = 256
"""Most partial sums of a gradient of weight or bias."""


class NormOutput(NamedTuple):
    """What a norm gives, and what its backward needs.

    Attributes:
        stream: [T, H], the norm's input: the residual stream after the branch joined it.
        y: [T, H] normalised, in the stream's dtype; empty if not asked for.
        mean: FP32 [T]; None in an RMSNorm.
        rstd: FP32 [T], ``1 / sqrt(variance + eps)``.
        partials: FP32 [1 to 1024], whose largest magnitude is y's amax; empty if not asked for.
    """

    stream: Tensor
    y: Tensor
    mean: Tensor | None
    rstd: Tensor
    partials: Tensor


class NormGradients(NamedTuple):
    """Gradients of a norm.

    Attributes:
        stream: [T, H].
        weight: [H] in the weight's dtype; empty without one.
        bias: [H], likewise; empty if not asked for.
        partials: FP32 [1 to 256], whose largest magnitude is the amax of the stream's gradient.
    """

    stream: Tensor
    weight: Tensor
    bias: Tensor
    partials: Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """What statistics are computed in: FP32, or FP64 for FP64."""
    return torch.promote_types(x.dtype, torch.float32)


def _norm(
    stream: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    wide = wide_dtype(stream)
    y = stream.to(wide)
    if mean is not None:
        y = y - mean[:, None]
    y = y * rstd[:, None]
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(stream.dtype)


_values = TiledValues(
    _norm, shape=lambda stream, *_: tuple(stream.shape), launchers="fp8train.kernels.gpu.norms"
)


def _residual_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    want_y: bool,
    want_partials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    stream = x if delta is None else x + delta
    wide = stream.to(wide_dtype(x))
    mean = None
    if kind == "layer":
        mean = wide.mean(dim=-1)
        variance = (wide - mean[:, None]).square().mean(dim=-1)
    else:
        variance = torch.linalg.vector_norm(wide, dim=-1).square_().div_(x.shape[1])
    rstd = variance.add_(eps).rsqrt_()
    y = _norm(stream, mean, rstd, weight, bias) if want_y or want_partials else x.new_empty(0)
    return (
        x.new_empty(0) if delta is None else stream,
        y if want_y else x.new_empty(0),
        rstd.new_empty(0) if mean is None else mean,
        rstd,
        amax_of(y).view(1) if want_partials else rstd.new_empty(0),
    )


def _residual_norm_fake(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    want_y: bool,
    want_partials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    count = count_of_partials(x.numel()) if want_partials else 0
    return (
        x.new_empty(0 if delta is None else x.shape),
        x.new_empty(x.shape if want_y else 0),
        x.new_empty(rows if kind == "layer" else 0, dtype=wide_dtype(x)),
        x.new_empty(rows, dtype=wide_dtype(x)),
        x.new_empty(count, dtype=torch.float32),
    )


_residual_norm_op = FusedOp(
    _residual_norm,
    launcher="fp8train.kernels.gpu.norms:residual_norm",
    fake=_residual_norm_fake,
    cost=lambda args, out: Cost(1, nbytes(*args[:4]), nbytes(*out)),
)


def residual_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    kind: Kind,
    want_y: bool = True,
    want_partials: bool = False,
) -> NormOutput:
    """Add a branch to the stream and normalise the sum.

    Args:
        x: [T, H].
        delta: the branch's output, likewise; None: the stream is x.
        weight: [H], or None for 1.
        bias: [H], or None for 0.
        eps: added to the variance.
        kind: of the norm.
        want_y: whether to write y; without, :func:`norm_cast` computes it.
        want_partials: whether to find y's amax.
    """
    x, delta = x.contiguous(), None if delta is None else delta.contiguous()
    stream, y, mean, rstd, partials = _residual_norm_op(
        x, delta, weight, bias, eps, kind, want_y, want_partials
    )
    return NormOutput(x if delta is None else stream, y, mean if kind == "layer" else None, rstd, partials)


def norm_cast(
    stream: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    partials: Tensor,
    rule: CastRule,
    delayed: Tensor | None = None,
    straight: bool = True,
    turned: bool = False,
) -> CastOperand:
    """Normalise once more, with statistics that are known, and cast; see
    :func:`~fp8train.kernels.operands.cast_operand`."""
    return _values.cast(
        stream,
        mean,
        rstd,
        weight,
        bias,
        partials=partials,
        rule=rule,
        delayed=delayed,
        straight=straight,
        turned=turned,
    )


def norm_again(
    stream: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y [T, H] once more, with statistics that are known: for a backward that kept only the stream."""
    return _values.forward(stream, mean, rstd, weight, bias)


def _norm_backward(
    grad_y: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, width = wide_dtype(stream), stream.shape[1]
    gain = torch.ones_like(stream[0], dtype=wide) if weight is None else weight.to(wide)
    grad, r = grad_y.to(wide), rstd[:, None]
    centred = stream.to(wide) if mean is None else stream.to(wide) - mean[:, None]
    normalised = centred * r
    product = grad * normalised
    inner = grad * gain
    along = torch.mv(product, gain).div_(width)[:, None]
    inner_mean = 0.0 if mean is None else inner.mean(dim=1, keepdim=True)
    result = (inner - inner_mean).sub_(normalised.mul_(along)).mul_(r).to(stream.dtype)
    if grad_stream is not None:
        result = result + grad_stream
    vector = stream if weight is None else weight
    return (
        result,
        vector.new_empty(0) if weight is None else product.sum(dim=0).to(vector.dtype),
        grad.sum(dim=0).to(vector.dtype) if want_bias else vector.new_empty(0),
        amax_of(result).view(1),
    )


def count_of_sums(numel: int) -> int:
    """How many programs backward has for that many elements, each with sums of its own: 1 to 256."""
    return min(MOST_SUMS, count_of_partials(numel))


def _norm_backward_fake(
    grad_y: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vector = stream if weight is None else weight
    return (
        torch.empty_like(stream),
        vector.new_empty(0 if weight is None else stream.shape[1]),
        vector.new_empty(stream.shape[1] if want_bias else 0),
        stream.new_empty(count_of_sums(stream.numel()), dtype=torch.float32),
    )


def _backward_cost(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> Cost:
    stream, vectors = args[2], (out[1].numel() > 0) + (out[2].numel() > 0)
    sums = 4 * vectors * count_of_sums(stream.numel()) * stream.shape[1]  # written, and read again
    return Cost(2 if vectors else 1, nbytes(*args[:6]) + sums, nbytes(*out) + sums)


_norm_backward_op = FusedOp(
    _norm_backward,
    launcher="fp8train.kernels.gpu.norms:norm_backward",
    fake=_norm_backward_fake,
    cost=_backward_cost,
)


def norm_backward(
    grad_y: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    *,
    want_bias: bool = False,
) -> NormGradients:
    """Gradients of :func:`residual_norm`; x and delta both have the stream's.

    Args:
        grad_y: [T, H]; copied if it is not contiguous.
        grad_stream: what else the stream's gradient has, likewise; added to the norm's own when that was
            rounded to the stream's dtype, as autograd adds two gradients. None: nothing.
        stream: [T, H], the norm's input.
        mean: FP32 [T]; None for an RMSNorm.
        rstd: FP32 [T].
        weight: [H] or None.
        want_bias: whether there is a bias, whose gradient is wanted.
    """
    grad_y, grad_stream = grad_y.contiguous(), None if grad_stream is None else grad_stream.contiguous()
    return NormGradients(*_norm_backward_op(grad_y, grad_stream, stream, mean, rstd, weight, want_bias))
