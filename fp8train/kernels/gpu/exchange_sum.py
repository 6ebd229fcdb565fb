"""Launchers of :mod:`fp8train.kernels.exchange_sum`.

Parts of ``per · (block + 1)`` bytes follow each other in a message; where their length is not a multiple of
16, most lie so that a thread cannot move 16 bytes at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.block_cast import format_of_bits
from fp8train.kernels.gpu.block_cast import decode_blocks, encode_blocks, shape_of_tile
from fp8train.kernels.gpu.codes import widen
from fp8train.kernels.gpu.launch import hardware, launch

_MOVED = 8192
"""Bytes that a program of the kernels that only move them has in hand."""


@triton.jit
def _wide(x):
    """int64; of a number that may be known to the compiler (1) too."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def _in_message(number, per, block, WHOLE: tl.constexpr):
    """Where the codes and the scale of blocks (int64) lie in a message of parts with ``per`` blocks each;
    ``WHOLE``: one part."""
    if WHOLE:
        return number * block, _wide(per) * block + number
    part = number // per
    begin, place = part * per * (block + 1), number % per
    return begin + place * block, begin + per * block + place


@triton.jit
def _pack_kernel(
    codes,
    scales,
    order,
    message,
    blocks,
    block,
    per,
    ORDER: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = number < blocks
    source = number
    if ORDER:
        source = tl.load(order + number, mask=inside, other=-1).to(tl.int64)
    there = inside & (source >= 0)
    scale = tl.load(scales + source, mask=there, other=127)  # padding: zeros of scale 1
    code = tl.load(codes + source[:, None] * block + column, mask=there[:, None] & (column < block), other=0)
    code_at, scale_at = _in_message(number, per, block, WHOLE)
    tl.store(message + code_at[:, None] + column, code, mask=inside[:, None] & (column < block))
    tl.store(message + scale_at, scale, mask=inside)


def pack_parts(codes: Tensor, scales: Tensor, order: Tensor | None, parts: int) -> Tensor:
    """:func:`fp8train.kernels.exchange_sum.pack`: one read of the codes, one write of the message."""
    assert codes.is_contiguous() and scales.is_contiguous()
    blocks, block = len(codes) if order is None else len(order), codes.shape[1]
    message = codes.new_empty(parts, blocks // parts * (block + 1))
    tile = shape_of_tile(block, _MOVED)
    launch(
        _pack_kernel,
        (triton.cdiv(blocks, tile["ROWS"]),),
        codes,
        scales,
        scales if order is None else order,
        message,
        blocks,
        block,
        blocks // parts,
        ORDER=order is not None,
        WHOLE=parts == 1,
        **tile,
        num_warps=4,
    )
    return message


@triton.jit
def _unpack_kernel(
    message, codes, scales, blocks, block, per, WHOLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (number < blocks)[:, None] & (column < block)
    code_at, scale_at = _in_message(number, per, block, WHOLE)
    code = tl.load(message + code_at[:, None] + column, mask=inside, other=0)
    scale = tl.load(message + scale_at, mask=number < blocks, other=0)
    tl.store(codes + number[:, None] * block + column, code, mask=inside)
    tl.store(scales + number, scale, mask=number < blocks)


def unpack_parts(message: Tensor, codes: Tensor, scales: Tensor) -> None:
    """:func:`fp8train.kernels.exchange_sum.unpack_into`: one read of the message, one write."""
    assert message.is_contiguous() and codes.is_contiguous() and scales.is_contiguous()
    blocks, block = codes.shape
    tile = shape_of_tile(block, _MOVED)
    launch(
        _unpack_kernel,
        (triton.cdiv(blocks, tile["ROWS"]),),
        message,
        codes,
        scales,
        blocks,
        block,
        blocks // len(message),
        WHOLE=len(message) == 1,
        **tile,
        num_warps=4,
    )


@triton.jit
def _part(messages, rank, number, column, blocks, block, CODED: tl.constexpr, MANTISSA: tl.constexpr,
          HARDWARE: tl.constexpr):  # fmt: skip
    """FP32 values of blocks of one rank's message."""
    inside = (number < blocks)[:, None] & (column < block)
    at = number[:, None] * block + column
    if CODED:
        message = messages + _wide(rank) * blocks * (block + 1)
        code = tl.load(message + at, mask=inside, other=0)
        scale = tl.load(message + _wide(blocks) * block + number, mask=number < blocks, other=127)
        return decode_blocks(code, scale, MANTISSA)
    message = messages + _wide(rank) * blocks * block
    return widen(tl.load(message + at, mask=inside, other=0.0), HARDWARE)


@triton.jit
def _sum_kernel(
    messages,
    total_out,
    packed,
    ranks,
    blocks,
    block,
    per,
    CODED: tl.constexpr,
    PACK: tl.constexpr,
    WHOLE: tl.constexpr,
    MANTISSA: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (number < blocks)[:, None] & (column < block)
    total = _part(messages, 0, number, column, blocks, block, CODED, MANTISSA, HARDWARE)
    for rank in range(1, ranks):
        total += _part(messages, rank, number, column, blocks, block, CODED, MANTISSA, HARDWARE)
    if PACK:
        # A lane outside of a block was 0 times the scale, NaN if that is.
        code, scale = encode_blocks(tl.where(inside, total, 0.0), MANTISSA, MAX_EXPONENT, HARDWARE)
        code_at, scale_at = _in_message(number, per, block, WHOLE)
        tl.store(packed + code_at[:, None] + column, code, mask=inside)
        tl.store(packed + scale_at, scale, mask=number < blocks)
    else:
        tl.store(total_out + number[:, None] * block + column, total, mask=inside)


def sum_parts(messages: Tensor, block: int, mantissa_bits: int, parts: int) -> tuple[Tensor, Tensor]:
    """:func:`fp8train.kernels.exchange_sum.sum_parts`: one read of all messages."""
    assert messages.is_contiguous()
    coded = messages.dtype == torch.uint8
    ranks, length = messages.shape
    blocks = length // (block + 1 if coded else block)
    total = messages.new_empty((0,) if parts else (blocks, block), dtype=torch.float32)
    shape = (parts, blocks // parts * (block + 1)) if parts else (0,)
    packed = messages.new_empty(shape, dtype=torch.uint8)
    tile = shape_of_tile(block)
    launch(
        _sum_kernel,
        (triton.cdiv(blocks, tile["ROWS"]),),
        messages,
        total,
        packed,
        ranks,
        blocks,
        block,
        blocks // max(1, parts),
        CODED=coded,
        PACK=parts > 0,
        WHOLE=parts == 1,
        MANTISSA=mantissa_bits,
        MAX_EXPONENT=format_of_bits(mantissa_bits).max_exponent,
        HARDWARE=hardware(),
        **tile,
        num_warps=8,
    )
    return total, packed
