"""The size of scale blocks: arithmetic that layout checks need before there are tensors.

See :mod:`fp8train.numerics.blocks` for what a block is.
"""

MAX_BLOCK = 128
_MIN_BLOCK = 32


def block_size(row_length: int, limit: int = MAX_BLOCK) -> int:
    """Elements that share a scale, for rows of this length.

    Args:
        row_length: size of the last dimension of the logical tensor, at least 1.
        limit: largest block.
    """
    if row_length <= limit:
        return row_length
    divisors = (size for size in range(limit, _MIN_BLOCK - 1, -1) if row_length % size == 0)
    return next(divisors, limit)
