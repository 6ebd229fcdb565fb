"""The size of scale blocks: arithmetic that layout checks need before there are tensors.

See :mod:`fp8train.numerics.block_scales` for what a block of a gradient or state is, and
:mod:`fp8train.numerics.granularity` for those of GEMM operands.
"""

from collections.abc import Mapping
from typing import Literal

Granularity = Literal["tensor", "row", "block_1x128", "block_128x128", "mx_1x32", "nv_1x16", "nv_16x16"]
"""What shares a scale in a GEMM operand."""

DIRECTED: frozenset[Granularity] = frozenset(("row", "block_1x128", "mx_1x32", "nv_1x16"))
"""Those that lie along the contracted dimension, so that an operand of two GEMMs is quantised twice."""

OPERAND_BLOCK: Mapping[Granularity, int] = {
    "block_1x128": 128,
    "block_128x128": 128,
    "mx_1x32": 32,
    "nv_1x16": 16,
    "nv_16x16": 16,
}
"""Elements of a block along the contracted dimension."""

SAVED_BLOCK = 16
"""Elements of a row that share a scale in what norms and non-linearities keep for backward in FP8."""

TWO_LEVELS: frozenset[Granularity] = frozenset(("nv_1x16", "nv_16x16"))
"""Those whose blocks have E4M3 scales below an FP32 scale of the tensor: NVFP4's."""

MAX_BLOCK = 128
MIN_BLOCK = 32


def block_size(row_length: int, limit: int = MAX_BLOCK) -> int:
    """Elements that share a scale, for rows of this length.

    Args:
        row_length: size of the last dimension of the logical tensor, at least 1.
        limit: largest block.
    """
    if row_length <= limit:
        return row_length
    divisors = (size for size in range(limit, MIN_BLOCK - 1, -1) if row_length % size == 0)
    return next(divisors, limit)


def scale_tile(granularity: Granularity, contracted: int) -> tuple[int | None, int | None]:
    """(rows, columns) that share a scale; None stands for all of them.

    Args:
        granularity: of an operand.
        contracted: dimension that the GEMM contracts, 0 or 1.
    """
    if granularity == "tensor":
        return None, None
    along = OPERAND_BLOCK.get(granularity)
    across = 1 if granularity in DIRECTED else along
    return (across, along) if contracted == 1 else (along, across)
