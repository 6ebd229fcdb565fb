"""Launchers of :mod:`fp8train.kernels.norms`.

A row lies in the registers of one program, so statistics need no second read; programs take several rows, one
after the other, and narrow rows several at a time. Backward's programs keep their sums of the gradients of
weight and bias in registers too, where they fit, and a second launch adds those of all programs, always in
one order. Rows that registers do not hold are left to plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels import norms
from fp8train.kernels.gpu.codes import largest_magnitude
from fp8train.kernels.gpu.elementwise import Tiles, larger_magnitude, launchers, round_like
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.norms import MOST_SUMS, count_of_sums
from fp8train.kernels.operands import count_of_partials

LARGEST_ROW = 16384
_LARGEST_SUMMED_ROW = 8192  # backward of longer rows keeps its sums in memory: the second-level cache
_TILE = 4096  # elements that a program holds, if a row is not longer
_SUM_COLUMNS = 32


@triton.jit
def _vector(pointer, column, width):
    """FP32 values [1, c] of a weight or bias, 0 beyond ``width``."""
    return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _with_gain(normalised, weight, bias, column, width):
    if weight is not None:
        normalised = normalised * _vector(weight, column, width)
    if bias is not None:
        normalised = normalised + _vector(bias, column, width)
    return normalised


@triton.jit
def _normalised(stream, mean, rstd, row, at, inside, height):
    """FP32 tile, before gain and bias."""
    values = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        values = values - tl.load(mean + row, mask=row < height, other=0.0)[:, None]
    return values * tl.load(rstd + row, mask=row < height, other=0.0)[:, None]


@triton.jit
def _norm_values(inputs, row, column, inside, OPTION: tl.constexpr, HARDWARE: tl.constexpr):
    stream, mean, rstd, weight, bias, height, width = inputs
    values = _normalised(stream, mean, rstd, row, row[:, None] * width + column[None, :], inside, height)
    return round_like(_with_gain(values, weight, bias, column, width), stream, HARDWARE)


def _tiles(
    stream: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tiles:
    assert stream.is_contiguous(), f"strides {stream.stride()}"
    height, width = stream.shape
    inputs = (stream, mean, rstd, weight, bias, height, width)
    return Tiles(_norm_values, inputs, stream, (height, width))


norm_forward, norm_amax, norm_cast = launchers(_tiles)


@triton.jit
def _residual_norm_kernel(
    x,
    delta,
    weight,
    bias,
    stream_out,
    y_out,
    mean_out,
    rstd_out,
    partials,
    height,
    width,
    eps,
    programs,
    LAYER: tl.constexpr,
    WANT_Y: tl.constexpr,
    WANT_PARTIALS: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    size = tl.full((ROWS,), width, tl.float32)
    found = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, height, programs * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if delta is not None:
            branch = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
            values = round_like(values + branch, x, HARDWARE)
            tl.store(stream_out + at, values, mask=inside)
        if LAYER:
            mean = tl.div_rn(tl.sum(values, 1), size)
            tl.store(mean_out + row, mean, mask=row < height)
            values = tl.where(inside, values - mean[:, None], 0.0)
        variance = tl.div_rn(tl.sum(values * values, 1), size)
        rstd = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
        tl.store(rstd_out + row, rstd, mask=row < height)
        if WANT_Y or WANT_PARTIALS:
            y = round_like(_with_gain(values * rstd[:, None], weight, bias, column, width), x, HARDWARE)
            if WANT_Y:
                tl.store(y_out + at, y, mask=inside)
            if WANT_PARTIALS:
                found = larger_magnitude(found, tl.where(inside, y, 0.0))
    if WANT_PARTIALS:
        tl.store(partials + tl.program_id(0), largest_magnitude(tl.ravel(found), 0))


def _row_shape(width: int) -> dict[str, int]:
    """Rows that a program holds at once, the power of two that a row fits, and warps: 8 to 32 elements a
    thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": 8 if rows * block <= _TILE else 16}


def residual_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    want_y: bool,
    want_partials: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`fp8train.kernels.norms.residual_norm`: one read of x and delta, one write of each result."""
    height, width = x.shape
    arguments = (x, delta, weight, bias, eps, kind, want_y, want_partials)
    out = norms._residual_norm_fake(*arguments)
    if width > LARGEST_ROW:
        *results, partials = norms._residual_norm(*arguments)
        return *results, partials.expand(out[-1].shape).contiguous()  # type: ignore[return-value]
    assert x.is_contiguous() and (delta is None or delta.is_contiguous())
    programs = count_of_partials(x.numel())
    launch(
        _residual_norm_kernel,
        (programs,),
        x,
        delta,
        weight,
        bias,
        *out,
        height,
        width,
        eps,
        programs,
        LAYER=kind == "layer",
        WANT_Y=want_y,
        WANT_PARTIALS=want_partials,
        HARDWARE=hardware(),
        **_row_shape(width),
    )
    return out


@triton.jit
def _norm_backward_kernel(
    grad_y,
    grad_stream,
    stream,
    mean,
    rstd,
    weight,
    grad_out,
    sums,
    partials,
    height,
    width,
    programs,
    WANT_BIAS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    size = tl.full((ROWS,), width, tl.float32)
    program = tl.program_id(0)
    weight_at = sums + program * width + column[None, :]
    bias_at = weight_at + programs * width
    in_width = (column < width)[None, :]
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    if IN_MEMORY:
        if weight is not None:
            tl.store(weight_at, weight_sum, mask=in_width)
        if WANT_BIAS:
            tl.store(bias_at, bias_sum, mask=in_width)
    elif weight is not None:
        gain = _vector(weight, column, width)
    # A LayerNorm needs the registers of a whole row of magnitudes.
    NARROW: tl.constexpr = IN_MEMORY or mean is not None
    found = tl.zeros((ROWS, 1 if NARROW else BLOCK), tl.float32)
    # Rows are fetched ahead, but not where that could fetch sums before they were stored.
    for start in tl.range(program * ROWS, height, programs * ROWS, num_stages=1 if IN_MEMORY else 2):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < height)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        normalised = _normalised(stream, mean, rstd, row, at, inside, height)
        product = grad * normalised
        if IN_MEMORY:
            if weight is not None:
                tl.store(weight_at, tl.load(weight_at, mask=in_width) + product, mask=in_width)
                gain = _vector(weight, column, width)
        else:
            bias_sum += grad
            weight_sum += product
        if weight is not None:
            grad, product = grad * gain, product * gain
        along = tl.div_rn(tl.sum(product, 1), size)[:, None]
        if IN_MEMORY:  # read again, from the first-level cache, rather than kept in registers
            grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
            if WANT_BIAS:
                tl.store(bias_at, tl.load(bias_at, mask=in_width) + grad, mask=in_width)
            if weight is not None:
                grad = grad * _vector(weight, column, width)
        if mean is not None:
            grad = grad - tl.div_rn(tl.sum(grad, 1), size)[:, None]
        if IN_MEMORY:
            normalised = _normalised(stream, mean, rstd, row, at, inside, height)
        r = tl.load(rstd + row, mask=row < height, other=0.0)[:, None]
        result = round_like((grad - normalised * along) * r, stream, HARDWARE)
        if grad_stream is not None:
            other = tl.load(grad_stream + at, mask=inside, other=0.0).to(tl.float32)
            result = round_like(result + other, stream, HARDWARE)
        tl.store(grad_out + at, result, mask=inside)
        result = tl.where(inside, result, 0.0)
        if NARROW:
            result = largest_magnitude(result, 1)[:, None]
        found = larger_magnitude(found, result)
    tl.store(partials + program, largest_magnitude(tl.ravel(found), 0))
    if not IN_MEMORY:
        if weight is not None:
            tl.store(weight_at, tl.sum(weight_sum, 0)[None, :], mask=in_width)
        if WANT_BIAS:
            tl.store(bias_at, tl.sum(bias_sum, 0)[None, :], mask=in_width)


@triton.jit
def _add_sums_kernel(
    sums,
    weight_out,
    bias_out,
    programs,
    width,
    HARDWARE: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.arange(0, MOST)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (program < programs)[:, None] & (column < width)[None, :]
    which = tl.program_id(1)  # 0: the weight's, 1: the bias's
    at = (which * programs + program)[:, None] * width + column[None, :]
    total = tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
    total = round_like(total, weight_out, HARDWARE)
    if which == 0:
        tl.store(weight_out + column, total, mask=column < width)
    else:
        tl.store(bias_out + column, total, mask=column < width)


def norm_backward(
    grad_y: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fp8train.kernels.norms.norm_backward`: one read of each input, and the sums, if any."""
    height, width = stream.shape
    assert weight is not None or not want_bias, "a bias has a weight beside it"
    arguments = (grad_y, grad_stream, stream, mean, rstd, weight, want_bias)
    out = norms._norm_backward_fake(*arguments)
    if width > LARGEST_ROW:
        *results, partials = norms._norm_backward(*arguments)
        return *results, partials.expand(out[-1].shape).contiguous()  # type: ignore[return-value]
    assert grad_y.is_contiguous() and stream.is_contiguous()
    assert grad_stream is None or grad_stream.is_contiguous()
    grad_out, grad_weight, grad_bias, partials = out
    programs, vectors = count_of_sums(stream.numel()), (weight is not None) + want_bias
    sums = torch.empty((vectors, programs, width), dtype=torch.float32, device=stream.device)
    launch(
        _norm_backward_kernel,
        (programs,),
        grad_y,
        grad_stream,
        stream,
        mean,
        rstd,
        weight,
        grad_out,
        sums,
        partials,
        height,
        width,
        programs,
        WANT_BIAS=want_bias,
        IN_MEMORY=width > _LARGEST_SUMMED_ROW,
        HARDWARE=hardware(),
        **_row_shape(width),
    )
    if vectors:
        launch(
            _add_sums_kernel,
            (triton.cdiv(width, _SUM_COLUMNS), vectors),
            sums,
            grad_weight,
            grad_bias,
            programs,
            width,
            HARDWARE=hardware(),
            MOST=MOST_SUMS,
            BLOCK=_SUM_COLUMNS,
            num_warps=8,
        )
    return out
