"""FP8 matrix multiplication by Transformer Engine, on operands that are ours.

TE follows BLAS: ``general_gemm(A, B, layout="TN")`` of A [N, K] and B [M, K], both row-major, is ``B · Aᵀ``
[M, N]. Its A is thus our ``b`` transposed, and its B our ``a``. That layout is the one which every GPU
multiplies in FP8, and the "row-wise" data of TE's storages (K last, scales along K) are its operands; the
"column-wise" ones, for layouts NN and NT, are never needed here. Scales are what decoding multiplies by
(``scale_inv``), as ours::

    granularity     TE's storage                    shape of scale_inv for data [R, K]
    tensor          Float8TensorStorage             [1]
    block_1x128     Float8BlockwiseQTensorStorage   [K / 128, R padded to 4], FP32: columns of ours
    block_128x128   the same, is_2D_scaled          [R / 128 rounded up, K / 128 padded to 4], FP32
    mx_1x32         MXFP8TensorStorage              [R padded to 128, K / 32 padded to 4], E8M0, tiles of
                                                    :func:`fp8train.kernels.scaling.mx_scales`

What TE multiplies (:func:`multiplies`, from ``cublaslt_gemm.cu`` and ``extensions/gemm.cpp``): tensor by
tensor from compute capability 8.9; 1x128 with 1x128 or 128x128 from 9.0 and CUDA 12.9, never 128x128 with
itself; on 10.x by reading blocks of 128 as four of MXFP8, so with powers of two only; MXFP8 on 10.x and 11.x.
There are no scales of rows. Shapes are in :func:`fits`: of short blocks along K TE's own tests have K = 64
alone, so those are left to others. ``alpha`` is the GEMM's own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fp8train.kernels.scaling import block_scales, mx_scales
from fp8train.kernels.te import te
from fp8train.precision.scale_blocks import OPERAND_BLOCK, Granularity
from fp8train.precision.transformer_engine import has_gemm

Kinds = tuple[Granularity, Granularity]
"""What shares a scale in operands A and B."""

_RESULTS = (torch.bfloat16, torch.float16, torch.float32)


def multiplies(
    kinds: Kinds,
    capability: tuple[int, int],
    cuda: tuple[int, int],
    out_dtype: torch.dtype,
    *,
    power_of_two: bool,
) -> bool:
    """Whether TE has a kernel for operands that share scales like this.

    Args:
        kinds: of both operands.
        capability: of the device.
        cuda: version that torch was built with.
        out_dtype: of the product.
        power_of_two: whether all scales are powers of two.
    """
    built = (12, 9) if "block_1x128" in kinds else (12, 8) if "mx_1x32" in kinds else (0, 0)
    return out_dtype in _RESULTS and cuda >= built and has_gemm(kinds, capability, power_of_two=power_of_two)


def fits(kinds: Kinds, m: int, k: int, n: int) -> bool:
    """Whether TE's kernel takes [M, K] by [K, N]: whole blocks along K, and 1x128 operands of a multiple of 8
    rows."""
    return all(
        k % OPERAND_BLOCK.get(kind, 1) == 0 and (kind != "block_1x128" or rows % 8 == 0)
        for kind, rows in zip(kinds, (m, n), strict=True)
    )


def shape_rule(pairs: Iterable[Kinds]) -> str:
    """What :func:`fits` asks of the shapes of these pairs, in words; empty for nothing."""
    kinds = {kind for pair in pairs for kind in pair}
    blocks = [OPERAND_BLOCK[kind] for kind in kinds if kind in OPERAND_BLOCK]
    rules = [f"K is a multiple of {max(blocks)}"] if blocks else []
    return " and ".join(
        [*rules, *(["1x128 operands have a multiple of 8 rows"] if "block_1x128" in kinds else [])]
    )


def storage(codes: Tensor, scale_inv: Tensor, kind: Granularity) -> object:
    """An operand in TE's class for it.

    Args:
        codes: FP8 [R, K], contiguous, K the contracted dimension.
        scale_inv: FP32, of the same matrix, as :mod:`fp8train.numerics.granularity` says.
        kind: what shares a scale.
    """
    classes, dtype = te("pytorch.tensor"), te("pytorch.constants").TE_DType[codes.dtype]
    data = codes.view(torch.uint8)
    if kind == "tensor":
        return classes.Float8TensorStorage(data=data, fp8_scale_inv=scale_inv.reshape(1), fp8_dtype=dtype)
    if kind == "mx_1x32":
        rows, columns = codes.shape[0], codes.shape[1] // 32
        scales = mx_scales(scale_inv).view(torch.uint8)
        return classes.MXFP8TensorStorage(
            rowwise_data=data,
            rowwise_scale_inv=scales.view(rows + -rows % 128, columns + -columns % 4),
            columnwise_data=None,
            columnwise_scale_inv=None,
            fp8_dtype=dtype,
            quantizer=None,
            with_gemm_swizzled_scales=True,
        )
    return classes.Float8BlockwiseQTensorStorage(
        rowwise_data=data,
        rowwise_scale_inv=block_scales(scale_inv, kind).t(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=dtype,
        quantizer=None,
        is_2D_scaled=kind == "block_128x128",
    )


def multiply(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    kinds: Kinds,
    *,
    alpha: float,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    """``alpha · (a · scale_inv_a) @ (b · scale_inv_b)``.

    Args:
        a: FP8 [M, K], any strides; copied unless K is last in memory.
        b: FP8 [K, N], likewise.
        scale_inv_a: FP32, as :mod:`fp8train.numerics.granularity` says.
        scale_inv_b: likewise.
        kinds: what they cover; a pair that TE :func:`multiplies`, of shapes that :func:`fits`.
        alpha: the GEMM's own multiplier.
        out_dtype: BF16, FP16 or FP32.
        fast_accumulation: Hopper's 14-bit accumulator; TE never uses it for blocks.

    Returns:
        [M, N] in ``out_dtype``.
    """
    turned = scale_inv_b.t() if scale_inv_b.dim() else scale_inv_b
    product: Tensor = te("pytorch.cpp_extensions").general_gemm(
        storage(b.t().contiguous(), turned, kinds[1]),
        storage(a.contiguous(), scale_inv_a, kinds[0]),
        out_dtype=out_dtype,
        alpha=alpha,
        layout="TN",
        use_split_accumulator=not fast_accumulation,
    )[0]
    return product
