"""Which scaled matmuls torch has for which scales, and how they want the scales laid out.

Read from torch's ``aten/src/ATen/native/cuda/ScaledBlas.cpp`` (2.13); A is [M, K], B is [K, N]:

===================  ==================  ============================================  =====================
A, B                 device              scales of A                                   scales of B
===================  ==================  ============================================  =====================
tensor, tensor       8.9 and newer       scalar                                        scalar
row, row             8.9 and newer (1)   [M, 1]                                        [1, N]
1x128, 1x128         9.0, CUDA >= 12.9   [M, K/128], strides (1, M)                    [N, K/128], (1, N)
1x128, 128x128       9.0, CUDA >= 12.9   likewise                                      [pad4(K/128), N/128],
                                                                                       (1, pad4(K/128))
128x128, 1x128       9.0, CUDA >= 12.9   [pad4(K/128), M/128], (1, pad4(K/128))        [N, K/128], (1, N)
mx 1x32, 1x32        10.0 and newer      E8M0, tiles of 128x4 in the tensor cores' order
===================  ==================  ============================================  =====================

(1) cuBLAS has this kernel on 9.0 with CUDA 12.9 or newer; torch's own, elsewhere, is sure of BF16 results
only and wants B in E4M3.

A pair that mixes tensor and row is row, row. Anything else has no kernel: its operands are decoded and
multiplied in high precision on the device (:mod:`fp8train.kernels.gemm`). So are shapes that a block kernel
may not take (:func:`fits_kernel`): cuBLAS wants 1x128 scales of a multiple of 4 rows, and torch's own check
of shapes counts whole blocks of 128x128 only. The CPU runs the first two rows, which the tests compare; the
block kernels were written from the rules above and never ran, but torch's checks accept what they get.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.precision.scale_blocks import OPERAND_BLOCK, Granularity

_BLOCK_PAIRS: set[tuple[Granularity, Granularity]] = {
    ("block_1x128", "block_1x128"),
    ("block_1x128", "block_128x128"),
    ("block_128x128", "block_1x128"),
}


def granularity_of(scale_inv: Tensor, shape: torch.Size, contracted: int) -> Granularity:
    """What the scales of an operand cover, by their shape; the simplest name for it (a 1x128 block that is
    the whole row is a row).

    Args:
        scale_inv: as :mod:`fp8train.numerics.granularity` says.
        shape: of the payload, at least 16 each way.
        contracted: dimension that the GEMM contracts.
    """
    if scale_inv.numel() == 1:
        return "tensor"
    along, across = scale_inv.shape[contracted], scale_inv.shape[1 - contracted]
    if along == 1 and across == shape[1 - contracted]:
        return "row"
    if across != shape[1 - contracted]:
        return "block_128x128"
    return "mx_1x32" if along == -(-shape[contracted] // 32) else "block_1x128"


def native_pair(
    a: Granularity,
    b: Granularity,
    capability: tuple[int, int],
    cuda: tuple[int, int],
    out_dtype: torch.dtype,
    b_dtype: torch.dtype = torch.float8_e4m3fn,
) -> bool:
    """Whether torch has a kernel for this pair.

    Args:
        a: of operand A.
        b: of operand B.
        capability: of the device.
        cuda: version that torch was built with.
        out_dtype: of the product.
        b_dtype: of B's payload.
    """
    if a == b == "tensor":
        return True
    hopper_cublas = capability == (9, 0) and cuda >= (12, 9)
    if {a, b} == {"tensor", "row"} or a == b == "row":
        return hopper_cublas or (out_dtype == torch.bfloat16 and b_dtype == torch.float8_e4m3fn)
    if (a, b) in _BLOCK_PAIRS:
        return hopper_cublas
    return a == b == "mx_1x32" and capability >= (10, 0)


def fits_kernel(a: Granularity, b: Granularity, m: int, k: int, n: int) -> bool:
    """Whether the kernel of a pair multiplies [M, K] by [K, N]: no block along K is short, and the other side
    of an operand is a multiple of 4 for 1x128 and of 128 for 128x128."""
    multiples = {"block_1x128": 4, "block_128x128": 128}
    return all(
        k % OPERAND_BLOCK.get(kind, 1) == 0 and size % multiples.get(kind, 1) == 0
        for kind, size in ((a, m), (b, n))
    )


def shape_rule(pairs: Iterable[tuple[Granularity, Granularity]]) -> str:
    """What :func:`fits_kernel` asks of the shapes of these pairs, in words; empty for nothing."""
    kinds = {kind for pair in pairs for kind in pair}
    blocks = [OPERAND_BLOCK[kind] for kind in kinds if kind in OPERAND_BLOCK]
    rules = [f"K a multiple of {max(blocks)}"] if blocks else []
    if "block_1x128" in kinds:
        rules.append("1x128 operands with a multiple of 4 rows")
    if "block_128x128" in kinds:
        rules.append("128x128 operands of whole blocks")
    return ", ".join(rules)


def cuda_version() -> tuple[int, int]:
    """(major, minor) version of the CUDA toolkit that torch was built with; (0, 0) for none."""
    major, _, minor = (torch.version.cuda or "0.0").partition(".")
    return int(major), int(minor)


def row_scales(scale_inv: Tensor, size: int, dim: int) -> Tensor:
    """Scalar or row scales as the row kernels take them: [size, 1] for ``dim`` 0, [1, size] for 1.

    torch wants stride 1 along the second dimension even where its size is 1, so a transposed view will not
    do, though it is contiguous.
    """
    flat = scale_inv.reshape(-1)
    flat = flat.expand(size).contiguous() if flat.numel() == 1 else flat
    return flat.view(size, 1) if dim == 0 else flat.view(1, size)


def empty_square_scales(scale_inv: Tensor) -> Tensor:
    """Memory of what :func:`block_scales` makes of scales of 128x128 blocks."""
    rows, columns = scale_inv.shape
    return scale_inv.new_empty((rows, columns + -columns % 4)).t()


def _square_scales(scale_inv: Tensor) -> Tensor:
    return F.pad(scale_inv, (0, -scale_inv.shape[1] % 4)).contiguous().t()


_square_op = FusedOp(
    _square_scales,
    launcher="fp8train.kernels.gpu.scaling:square_scales",
    fake=empty_square_scales,
    cost=lambda args, out: Cost(1, nbytes(*args), nbytes(out)),
)


def block_scales(scale_inv: Tensor, granularity: Granularity) -> Tensor:
    """Scales of 1x128 or 128x128 blocks in the kernels' strides.

    Args:
        scale_inv: FP32 [rows, K/128] or [rows/128, K/128]; for B those of its transpose.
        granularity: one of the two.

    Returns:
        [rows, K/128] with strides (1, rows), itself if it has them (:mod:`fp8train.kernels.group_operands`
        casts so); or [pad4(K/128), rows/128] with strides (1, pad4(K/128)), a view of other storage.
    """
    if granularity == "block_1x128":
        return scale_inv.t().contiguous().t()
    result: Tensor = _square_op(scale_inv)
    return result


def empty_mx_scales(scale_inv: Tensor) -> Tensor:
    """Memory of what :func:`mx_scales` returns."""
    rows, columns = scale_inv.shape
    return scale_inv.new_empty((rows + -rows % 128) * (columns + -columns % 4), dtype=torch.float8_e8m0fnu)


def _mx_scales(scale_inv: Tensor) -> Tensor:
    exponents = ((scale_inv.contiguous().view(torch.int32) >> 23) & 0xFF).to(torch.uint8)
    rows, columns = exponents.shape
    tiles = F.pad(exponents, (0, -columns % 4, 0, -rows % 128)).view(
        -(-rows // 128), 4, 32, -(-columns // 4), 4
    )
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(torch.float8_e8m0fnu)


_mx_op = FusedOp(
    _mx_scales,
    launcher="fp8train.kernels.gpu.scaling:mx_scales",
    fake=empty_mx_scales,
    cost=lambda args, out: Cost(1, nbytes(*args), nbytes(out)),
)


def mx_scales(scale_inv: Tensor) -> Tensor:
    """E8M0 bytes in the order in which the tensor cores read them.

    Scales are cut into tiles of 128 rows and 4 columns, padded with zeros; in a tile, that of row r and
    column c is byte ``16 (r mod 32) + 4 (r div 32) + c`` (cuBLAS, "1D block scaling factors layout").

    Args:
        scale_inv: FP32 powers of two or NaN [rows, K/32], any strides; for B those of its transpose.

    Returns:
        float8_e8m0fnu, flat: tiles row by row.
    """
    result: Tensor = _mx_op(scale_inv)
    return result


def scaled_mm_of_arrays(
    a: Tensor,
    b: Tensor,
    scale_inv_a: Tensor,
    scale_inv_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast_accumulation: bool,
) -> Tensor:
    """torch's scaled matmul for scales of rows or blocks.

    Args:
        a: FP8 [M, K], row-major.
        b: FP8 [K, N], column-major.
        scale_inv_a: FP32, as :mod:`fp8train.numerics.granularity` says.
        scale_inv_b: likewise.
        out_dtype: BF16, FP16 or FP32.
        fast_accumulation: Hopper's 14-bit accumulator.

    Returns:
        [M, N] in ``out_dtype``. torch raises what it has to say about a pair that its device does not
        multiply.
    """
    kind_a, kind_b = granularity_of(scale_inv_a, a.shape, 1), granularity_of(scale_inv_b, b.shape, 0)
    swizzle = None
    types = {
        "block_1x128": F.ScalingType.BlockWise1x128,
        "block_128x128": F.ScalingType.BlockWise128x128,
        "mx_1x32": F.ScalingType.BlockWise1x32,
    }
    if {kind_a, kind_b} <= {"tensor", "row"}:
        recipes = (F.ScalingType.RowWise, F.ScalingType.RowWise)
        scale_inv_a = row_scales(scale_inv_a, a.shape[0], 0)
        scale_inv_b = row_scales(scale_inv_b, b.shape[1], 1)
    else:
        recipes = (types[kind_a], types[kind_b])
        if kind_a == "mx_1x32":
            swizzle = F.SwizzleType.SWIZZLE_32_4_4
            scale_inv_a, scale_inv_b = mx_scales(scale_inv_a), mx_scales(scale_inv_b.t())
        else:
            scale_inv_a = block_scales(scale_inv_a, kind_a)
            scale_inv_b = block_scales(scale_inv_b.t(), kind_b)
    return F.scaled_mm(
        a,
        b,
        scale_inv_a,
        recipes[0],
        scale_inv_b,
        recipes[1],
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=out_dtype,
        use_fast_accum=fast_accumulation,
    )
