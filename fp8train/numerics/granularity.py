"""Which elements of a matrix share a scale.

A GEMM ``a [M, K] @ b [K, N]`` sums over K, the *contracted* dimension. A scale that is constant along K can
be taken out of the sum (``row``: one for each row of a, each column of b); one that varies along K must be
constant over runs of it, which the hardware multiplies block by block (DeepSeek-V3's 1x128 and 128x128, OCP
MX's 1x32). With ``contracted`` the number of that dimension in the matrix as it is stored::

    granularity      contracted: 1        contracted: 0        scales of [M, K], contracted: 1
    tensor           everything           everything           []
    row              a row                a column             [M, 1]
    block_1x128      128 of a row         128 of a column      [M, ceil(K / 128)]
    mx_1x32          32 of a row          32 of a column       [M, ceil(K / 32)]
    block_128x128    128 rows x 128 columns                    [ceil(M / 128), ceil(K / 128)]

Blocks start at element 0; the last one may be short. Arrays of scales have the matrix's two dimensions, and
their shape says what each scale covers (:func:`expand_scales`): no size from 2 on is both ``ceil(n / 32)``
and ``ceil(n / 128)``, unless both are 1, nor either of them and n. So transposing payload and scales together
is transposing the operand.

NVFP4's 1x16 and 16x16 (:mod:`fp8train.numerics.nvfp4`) have the tensor's scale here, a scalar: those of
blocks are in the payload.

Sources: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2; OCP Microscaling 1.0; Mishra et al. 2025,
arXiv 2506.08027 (MXFP8 scales rounded up).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.precision.scale_blocks import OPERAND_BLOCK, TWO_LEVELS, Granularity, scale_tile

_BLOCKS = sorted({size for name, size in OPERAND_BLOCK.items() if name not in TWO_LEVELS})


def amax_along(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """Largest magnitudes along a dimension, in x's dtype; NaN where there is NaN."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.abs().amax(dim=dim, keepdim=keepdim)
    # aminmax along a dimension is a scalar loop, ten times slower than these; so is amax of BF16 rows.
    if x.dtype == torch.bfloat16:
        return x.float().abs_().amax(dim=dim, keepdim=keepdim).to(x.dtype)
    return x.abs().amax(dim=dim, keepdim=keepdim)


def amaxes(x: Tensor, granularity: Granularity, contracted: int) -> Tensor:
    """Largest magnitude of each group of elements that share a scale.

    Args:
        x: floating matrix [M, K].
        granularity: not ``tensor`` (:func:`fp8train.numerics.cast.amax_of` serves that).
        contracted: dimension that the GEMM contracts.

    Returns:
        FP32, one for each scale as in the module's table; NaN where one of its elements is.
    """
    rows, columns = scale_tile(granularity, contracted)
    return _largest(_largest(x, 1, columns), 0, rows).float().abs()  # abs: the maximum of -0 and 0 may be -0


def _largest(x: Tensor, dim: int, size: int | None) -> Tensor:
    """Signed or unsigned value of largest magnitude of each ``size`` elements along ``dim``."""
    if size == 1:
        return x
    if size is not None:
        short = -x.shape[dim] % size
        if short:
            x = F.pad(x, (0, short) if dim == 1 else (0, 0, 0, short))
        x = x.unflatten(dim, (-1, size))
    elif x.shape[dim] == 0:
        return x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))
    reduced = dim if size is None else dim + 1
    return amax_along(x, reduced, keepdim=size is None)


def expand_scales(scales: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Repeat ``scales`` until they broadcast against their matrix.

    Args:
        scales: scalar, or 2-D as in the module's table.
        shape: of the matrix.

    Returns:
        A scalar, or 2-D with sizes that are 1 or those of ``shape``; ``scales`` itself where it is that
        already.
    """
    if scales.dim() == 0 or all(count in (1, size) for count, size in zip(scales.shape, shape, strict=True)):
        return scales
    # Opaque to torch.compile: torch 2.13 compiles repeated scales wrongly for a CPU where the result is cast
    # to FP8 and a block is short.
    call = _expand_op if torch.compiler.is_compiling() else _expand
    return call(scales, *shape)


def _expand(scales: Tensor, rows: int, columns: int) -> Tensor:
    for dim, size in enumerate((rows, columns)):
        count = scales.shape[dim]
        if count not in (1, size):
            fitting = [block for block in _BLOCKS if -(-size // block) == count]
            assert fitting, f"{count} scales do not fit {size} elements"
            scales = scales.repeat_interleave(fitting[0], dim).narrow(dim, 0, size)
    return scales.contiguous()


@torch.library.custom_op("fp8train::expand_scales", mutates_args=())
def _expand_op(scales: Tensor, rows: int, columns: int) -> Tensor:
    return _expand(scales, rows, columns)


@_expand_op.register_fake
def _(scales: Tensor, rows: int, columns: int) -> Tensor:
    shape = [1 if count == 1 else size for count, size in zip(scales.shape, (rows, columns), strict=True)]
    return scales.new_empty(shape)
