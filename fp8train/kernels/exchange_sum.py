"""What ranks do with the messages of an FP8 exchange (:mod:`fp8train.comm.exchange`), one launch each.

A message has a *part* for each rank: the codes of its blocks, then their scales, so that one transfer carries
both. A rank packs what it sends, adds what it received, and takes apart what it gathered. The sum of N parts
is formed in registers, in rank order, and is cast there too if it travels on: whatever N is, each byte that
arrived is read once, and what leaves is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.kernels.block_cast import format_of_bits
from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.numerics.block_scales import dequantize_blocks, quantize_blocks
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import Format

Quantized = tuple[Tensor, Tensor]
"""(payload FP8 [blocks, block], E8M0 scales uint8 [blocks])."""
_UNIT_SCALE = 127  # the E8M0 byte of 1


def _pack_parts(codes: Tensor, scales: Tensor, order: Tensor | None, parts: int) -> Tensor:
    if order is not None:
        there = order >= 0
        source = order.clamp(min=0)
        codes = codes[source].masked_fill_(~there[:, None], 0)
        scales = scales[source].masked_fill_(~there, _UNIT_SCALE)
    return torch.cat((codes.reshape(parts, -1), scales.view(parts, -1)), dim=1)


def _pack_parts_fake(codes: Tensor, scales: Tensor, order: Tensor | None, parts: int) -> Tensor:
    blocks = len(codes) if order is None else len(order)
    return codes.new_empty(parts, blocks // parts * (codes.shape[1] + 1))


_pack_op = FusedOp(
    _pack_parts,
    launcher="fp8train.kernels.gpu.exchange_sum:pack_parts",
    fake=_pack_parts_fake,
    cost=lambda args, out: Cost(1, nbytes(out, args[2]), nbytes(out)),
)


def pack(payload: Tensor, scales: Tensor, parts: int, *, order: Tensor | None = None) -> Tensor:
    """Put codes and scales of each part side by side, so that one message carries both.

    Args:
        payload: FP8 [blocks, block], contiguous.
        scales: uint8 [blocks].
        parts: receivers; the message's blocks are a multiple of them.
        order: integers [blocks of the message], the block that lies in each place; -1 for one of zeros. None:
            all in the order that they have.

    Returns:
        uint8 [parts, blocks of the message / parts · (block + 1)].
    """
    result: Tensor = _pack_op(payload.view(torch.uint8), scales, order, parts)
    return result


def unpack(message: Tensor, block: int, dtype: torch.dtype) -> Quantized:
    """Take one part's message apart: uint8 [blocks · (block + 1)] -> (payload [blocks, block], scales
    [blocks]), views of it."""
    blocks = message.numel() // (block + 1)
    codes = message[: blocks * block].view(blocks, block)
    return codes.view(dtype), message[blocks * block :]


def _unpack_parts(message: Tensor, codes: Tensor, scales: Tensor) -> None:
    parts = len(message)
    cut = codes.numel() // parts
    codes.view(parts, -1).copy_(message[:, :cut])
    scales.view(parts, -1).copy_(message[:, cut:])


def _unpack_parts_fake(message: Tensor, codes: Tensor, scales: Tensor) -> None:
    return None


_unpack_op = FusedOp(
    _unpack_parts,
    launcher="fp8train.kernels.gpu.exchange_sum:unpack_parts",
    fake=_unpack_parts_fake,
    cost=lambda args, out: Cost(1, nbytes(args[0]), nbytes(args[0])),
    mutates=("codes", "scales"),
)


def unpack_into(message: Tensor, into: Quantized) -> None:
    """The inverse of :func:`pack`, into memory that is there.

    Args:
        message: uint8 [parts, blocks / parts · (block + 1)].
        into: (payload [blocks, block], scales [blocks]), contiguous, written.
    """
    _unpack_op(message, into[0].view(torch.uint8), into[1])


def _sum_parts(messages: Tensor, block: int, mantissa_bits: int, parts: int) -> tuple[Tensor, Tensor]:
    fmt = format_of_bits(mantissa_bits)
    total = messages.new_empty(0, dtype=torch.float32)
    for rank, message in enumerate(messages):
        if message.dtype == torch.bfloat16:
            values = message.view(-1, block).float()
        else:
            values = dequantize_blocks(*unpack(message, block, dtype_of(fmt)))
        total = total.add_(values) if rank else values
    if parts == 0:
        return total, messages.new_empty(0, dtype=torch.uint8)
    payload, scales = quantize_blocks(total, fmt)
    return total.new_empty(0), _pack_parts(payload.view(torch.uint8), scales, None, parts)


def _sum_parts_fake(messages: Tensor, block: int, mantissa_bits: int, parts: int) -> tuple[Tensor, Tensor]:
    blocks = messages.shape[1] // (block if messages.dtype == torch.bfloat16 else block + 1)
    total = messages.new_empty((0,) if parts else (blocks, block), dtype=torch.float32)
    shape = (parts, blocks // parts * (block + 1)) if parts else (0,)
    return total, messages.new_empty(shape, dtype=torch.uint8)


_sum_op = FusedOp(
    _sum_parts,
    launcher="fp8train.kernels.gpu.exchange_sum:sum_parts",
    fake=_sum_parts_fake,
    cost=lambda args, out: Cost(1, nbytes(args[0]), nbytes(*out)),
)


def sum_parts(messages: Tensor, block: int, fmt: Format) -> Tensor:
    """FP32 sum of the parts received, in rank order.

    Args:
        messages: uint8 [N, blocks · (block + 1)], codes and scales; or BF16 [N, blocks · block].
        block: elements of a block.
        fmt: of the codes.

    Returns:
        FP32 [blocks, block].
    """
    total: Tensor = _sum_op(messages, block, fmt.mantissa_bits, 0)[0]
    return total


def sum_and_pack(messages: Tensor, block: int, fmt: Format, *, parts: int = 1) -> Tensor:
    """The sums of :func:`sum_parts`, quantised and packed: uint8 [parts, blocks / parts · (block + 1)]."""
    message: Tensor = _sum_op(messages, block, fmt.mantissa_bits, parts)[1]
    return message
