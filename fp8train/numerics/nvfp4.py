"""NVFP4, simulated: values are rounded to what FP4 operands can hold and stay in a wider type.

An NVFP4 operand has E2M1 codes (0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), an E4M3 scale for each block of 16
elements along the contracted dimension (weights: each 16x16, so that one copy serves both GEMMs), and one
FP32 scale for the tensor::

    S = 448 · 6 / amax(tensor)         s = E4M3(amax(block) / 6 · S)         q = E2M1(x · S / s)

so x stands for ``q · s / S``. The product ``q · s`` has 6 significant bits and is at most 2688: exact in
BF16. It is the *payload* here, and 1 / S its ``scale_inv``. A GEMM of payloads in FP32 is the GEMM of FP4
tensor cores, accumulation order apart; nothing is faster or smaller for it. Where s rounds down, the block's
largest elements are cut to 6; a block 2^18.8 times smaller than the tensor's amax has s = 0 and vanishes.

**Stochastic rounding** (gradients). The random bits of an element are a hash of its block's values and of
its place in the block. So the same gradient is rounded alike in every layout, order and resumed run, with no
counter to carry; over different gradients the rounding is unbiased. Equal blocks round alike.

**Random Hadamard transform** (both operands of grad_weight). In each block of 16 tokens, ``x -> H D x`` with
random signs D and the Hadamard matrix H / 4 spreads an outlier over its block. H D is orthogonal, so the
product over tokens is unchanged but for rounding. Missing tokens of the last block are zeros. The signs are
fixed, as in Transformer Engine; the four butterfly stages add in the same order everywhere.

Source: NVIDIA 2025, arXiv 2509.25149, sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.numerics.formats import dtype_of
from fp8train.numerics.stochastic import mix_bits, random_bits, round_stochastic, stream_key
from fp8train.precision.number_formats import E2M1, E4M3

BLOCK = 16
LARGEST = E4M3.max * E2M1.max
"""Largest payload."""
_MAX_SCALE = 2.0**100  # of the tensor, so that S / s is finite
_SIGNS = stream_key(0, 0, "hadamard")


def round_e2m1(x: Tensor, bits: Tensor | None = None) -> Tensor:
    """The E2M1 numbers for ``x``; beyond 6 they are 6.

    Args:
        x: FP32; NaN stays.
        bits: int32 random patterns of x's shape, to round stochastically; None rounds to nearest, ties to the
            even code.

    Returns:
        FP32.
    """
    magnitude = x.abs().clamp(max=E2M1.max)
    if bits is not None:
        rounded = round_stochastic(magnitude, E2M1.mantissa_bits, 1 - E2M1.bias, bits)
    else:
        spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
        rounded = (magnitude / spacing).round() * spacing
    return torch.copysign(rounded, x)


def hadamard(x: Tensor, dim: int) -> Tensor:
    """``H D x`` of each 16 elements along ``dim``.

    Args:
        x: FP32 or FP64 matrix.
        dim: 0 or 1.

    Returns:
        As x, ``dim`` padded to a multiple of 16.
    """
    blocks = _padded(x, 16 if dim == 0 else 1, 16 if dim == 1 else 1).unflatten(dim, (-1, BLOCK))
    signs = 1 - 2 * (random_bits(_SIGNS, 0, BLOCK, x.device) & 1).to(x.dtype)
    values = blocks.movedim(dim + 1, -1) * signs
    for width in (1, 2, 4, 8):
        pairs = values.unflatten(-1, (-1, 2, width))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((a + b, a - b), dim=-2).flatten(-3)
    return (values * 0.25).movedim(-1, dim + 1).flatten(dim, dim + 1)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    short = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    return F.pad(x, short) if any(short) else x


def block_bits(blocks: Tensor) -> Tensor:
    """Random bits of every element from the values of its block.

    Args:
        blocks: FP32 [.., 16].

    Returns:
        int32 [.., 16].
    """
    odd = random_bits(stream_key(0, 1, "nvfp4"), 0, BLOCK, blocks.device) | 1
    content = (blocks + 0.0).contiguous().view(torch.int32)  # -0 becomes 0
    key = mix_bits((mix_bits(content) * odd).sum(dim=-1, keepdim=True, dtype=torch.int32))
    place = random_bits(stream_key(0, 2, "nvfp4"), 0, BLOCK, blocks.device)
    return mix_bits(key ^ place)


def quantize_nvfp4(
    x: Tensor, amax: Tensor, dtype: torch.dtype, *, contracted: int, square: bool, stochastic: bool
) -> tuple[Tensor, Tensor]:
    """Round a matrix to values of NVFP4.

    Args:
        x: FP32 [M, K].
        amax: FP32 scalar, largest magnitude of the logical tensor.
        dtype: of the payload: BF16, FP32 or FP64.
        contracted: dimension that the GEMM contracts, along which blocks lie.
        square: blocks of 16x16.
        stochastic: round codes stochastically; not with ``square``.

    Returns:
        (payload [M, K], scale_inv FP32 scalar); ``scale_inv`` is NaN where amax is not finite.
    """
    # Under torch.compile the operation is opaque: the same code runs and gives the same bits as eagerly.
    call = _quantize_op if torch.compiler.is_compiling() else _quantize
    return call(x, amax, dtype, contracted, square, stochastic)


def _quantize(
    x: Tensor, amax: Tensor, dtype: torch.dtype, contracted: int, square: bool, stochastic: bool
) -> tuple[Tensor, Tensor]:
    assert not (square and stochastic), "random bits are of blocks of 16"
    finite = torch.isfinite(amax)
    scale = torch.where(finite & (amax > 0), (LARGEST / amax).clamp(max=_MAX_SCALE), 1.0)
    matrix = x if contracted == 1 else x.t()
    rows, columns = matrix.shape
    high = BLOCK if square else 1
    padded = _padded(matrix, high, BLOCK)
    tiles = padded.reshape(padded.shape[0] // high, high, -1, BLOCK)
    block = tiles.abs().amax(dim=(1, 3), keepdim=True)
    block_scale = (block / E2M1.max * scale).clamp(max=E4M3.max).to(dtype_of(E4M3)).float()
    encode = torch.where(block_scale > 0, scale / block_scale, 0.0)
    codes = round_e2m1(tiles * encode, block_bits(tiles) if stochastic else None)
    payload = (codes * block_scale).reshape(padded.shape)[:rows, :columns].to(dtype)
    payload = payload.contiguous() if contracted == 1 else payload.t().contiguous()
    return payload, torch.where(finite, 1 / scale, torch.nan)


@torch.library.custom_op("fp8train::quantize_nvfp4", mutates_args=())
def _quantize_op(
    x: Tensor, amax: Tensor, dtype: torch.dtype, contracted: int, square: bool, stochastic: bool
) -> tuple[Tensor, Tensor]:
    return _quantize(x, amax, dtype, contracted, square, stochastic)


@_quantize_op.register_fake
def _(
    x: Tensor, amax: Tensor, dtype: torch.dtype, contracted: int, square: bool, stochastic: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), amax.new_empty(())
