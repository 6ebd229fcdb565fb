"""Launcher of :mod:`fp8train.kernels.optimizer_update`: one kernel that finds its tensors in a table.

A program belongs to one parameter and walks over its tiles, ``rows_of_a_tile`` blocks of a row each. A block
is one row of a tile, so its scale is a reduction along a row. Where rows end in whole blocks, a tile is a
run of memory, and addresses are a number plus a constant pattern; other rows need a division per block.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fp8train.kernels.gpu.codes import (
    decode_e8m0,
    decode_fp8,
    encode_e8m0,
    encode_fp8,
    exponent_from_amax,
    is_finite,
    largest,
    largest_magnitude,
    narrow,
    pow2,
    random_bits,
    round_stochastic,
    widen,
)
from fp8train.kernels.gpu.launch import hardware, launch
from fp8train.kernels.optimizer_update import (
    BFLOAT16,
    NOTHING,
    NUMBERS,
    PLACES,
    REMAINDER,
    RULES,
    WIDE,
    Signature,
    rows_of_a_tile,
)
from fp8train.precision.number_formats import FP16

_WIDE, _BF16, _REMAINDER, _NOTHING = map(tl.constexpr, (WIDE, BFLOAT16, REMAINDER, NOTHING))
_FP16 = tl.constexpr(FP16.mantissa_bits)
_ADAMW = tl.constexpr(RULES.index("adamw"))
_PLACES, _NUMBERS = tl.constexpr(len(PLACES)), tl.constexpr(len(NUMBERS))
_FIRST_PROGRAM = tl.constexpr(PLACES.index("first_program"))
_KEEP = tl.constexpr(NUMBERS.index("keep"))


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer that a table holds as a number; what is known of its alignment lets accesses be wide."""
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _number(numbers, COLUMN: tl.constexpr):
    """An FP32 number of the step's table."""
    return tl.load(numbers + COLUMN).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_blocks(
    payload,
    scale,
    start,
    at,
    inside,
    block,
    exists,
    FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """FP32 values [blocks, lanes] of a state or gradient.

    Args: ``payload``, ``scale``: addresses; ``start + at``: elements; ``inside``: which exist; ``block``,
    ``exists``: likewise of blocks [blocks].
    """
    if FORMAT == _WIDE:
        values = tl.load(_pointer(payload, tl.float32, ALIGNED) + start + at, mask=inside, other=0.0)
    elif FORMAT == _BF16:
        codes = tl.load(_pointer(payload, tl.bfloat16, ALIGNED) + start + at, mask=inside, other=0.0)
        values = widen(codes, HARDWARE)
    elif FORMAT == _REMAINDER:
        high = tl.load(_pointer(payload, tl.uint16, ALIGNED) + start + at, mask=inside, other=0)
        low = tl.load(_pointer(scale, tl.int16, ALIGNED) + start + at, mask=inside, other=0)
        word = (high.to(tl.uint32) << 16) + low.to(tl.int32).to(tl.uint32, bitcast=True)
        values = word.to(tl.float32, bitcast=True)
    else:
        if FORMAT == _FP16:
            codes = tl.load(_pointer(payload, tl.float16, ALIGNED) + start + at, mask=inside, other=0.0)
            values = codes.to(tl.float32)
        else:
            codes = tl.load(_pointer(payload, tl.uint8, ALIGNED) + start + at, mask=inside, other=0)
            values = decode_fp8(codes, FORMAT, HARDWARE)
        factor = decode_e8m0(tl.load(_pointer(scale, tl.uint8, False) + block, mask=exists, other=127))
        values = values * factor[:, None]
    return values


@triton.jit
def _store(
    payload,
    scale,
    values,
    bits,
    start,
    at,
    inside,
    block,
    exists,
    FORMAT: tl.constexpr,
    RANDOM: tl.constexpr,
    ALIGNED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Encode values, which are 0 outside, and return what their codes stand for.

    Args: as of :func:`load_blocks`; ``bits``: uint32 patterns, read if ``RANDOM``.
    """
    if FORMAT == _WIDE:
        tl.store(_pointer(payload, tl.float32, ALIGNED) + start + at, values, mask=inside)
        stored = values
    elif FORMAT == _BF16:
        if RANDOM:
            values = round_stochastic(values, bits, 7, -126)
        code = narrow(values, HARDWARE)
        tl.store(_pointer(payload, tl.bfloat16, ALIGNED) + start + at, code, mask=inside)
        stored = widen(code, HARDWARE)
    elif FORMAT == _REMAINDER:
        word = values.to(tl.int32, bitcast=True)
        high = (word + 0x8000) >> 16  # keeps the sign, as in the reference
        tl.store(_pointer(payload, tl.int16, ALIGNED) + start + at, high.to(tl.int16), mask=inside)
        low = (word - (high << 16)).to(tl.int16)
        tl.store(_pointer(scale, tl.int16, ALIGNED) + start + at, low, mask=inside)
        stored = values
    else:
        MAX_EXPONENT: tl.constexpr = 8 if FORMAT == 3 else 15
        MIN_EXPONENT: tl.constexpr = -6 if FORMAT == 3 else -14
        amax = largest_magnitude(values, 1)
        finite = is_finite(amax)
        if RANDOM:
            k = exponent_from_amax(amax, MAX_EXPONENT)
        else:
            k = exponent_from_amax(tl.where(finite, amax, 0.0), MAX_EXPONENT)
        byte = encode_e8m0(-k, finite)
        tl.store(_pointer(scale, tl.uint8, False) + block, byte, mask=exists)
        # Within the format, as the scale was made for it; but for infinity, which becomes the largest number.
        scaled = values * pow2(k)[:, None]
        if FORMAT == _FP16:  # encoding FP8 does that itself
            scaled = tl.clamp(scaled, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        if RANDOM:
            scaled = round_stochastic(scaled, bits, FORMAT, MIN_EXPONENT)
        if FORMAT == _FP16:
            code = scaled.to(tl.float16)
            tl.store(_pointer(payload, tl.float16, ALIGNED) + start + at, code, mask=inside)
            stored = code.to(tl.float32)
        else:
            code = encode_fp8(scaled, FORMAT, HARDWARE)
            tl.store(_pointer(payload, tl.uint8, ALIGNED) + start + at, code, mask=inside)
            stored = decode_fp8(code, FORMAT, HARDWARE)
        stored = stored * decode_e8m0(byte)[:, None]
    return stored


@triton.jit
def _lerp(start, end, weight):
    """From ``start`` to ``end``, from the nearer of them."""
    near = weight < 0.5
    return tl.where(near, start, end) + (end - start) * tl.where(near, weight, weight - 1.0)


@triton.jit
def _flushed(stored, values):
    """How many values of each block were stored as zero and were not: int32 [blocks]."""
    return tl.sum(((stored == 0) & (values != 0)).to(tl.int32), axis=1)


@triton.jit
def _update_kernel(
    multiplier,
    places,
    numbers,
    program_of,
    partials,
    flushed,
    width,
    RULE: tl.constexpr,
    GRADIENT: tl.constexpr,
    MASTER: tl.constexpr,
    MASTER_RANDOM: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_RANDOM: tl.constexpr,
    SECOND: tl.constexpr,
    SECOND_RANDOM: tl.constexpr,
    SECOND_ROOT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    CUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    MOST: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    # Which parameter, and which part of it.
    program = tl.program_id(0)
    parameter = tl.load(program_of + program).to(tl.int64)
    places += parameter * _PLACES
    numbers += parameter * _NUMBERS
    master, master_scale = tl.load(places), tl.load(places + 1)
    first, first_scale = tl.load(places + 2), tl.load(places + 3)
    second, second_scale = tl.load(places + 4), tl.load(places + 5)
    weight = tl.load(places + 6)
    number = program - tl.load(places + _FIRST_PROGRAM)
    programs, blocks = tl.load(places + _FIRST_PROGRAM + 1), tl.load(places + _FIRST_PROGRAM + 2)
    row, offset = tl.load(places + _FIRST_PROGRAM + 3), tl.load(places + _FIRST_PROGRAM + 4)
    logical_row = tl.load(places + _FIRST_PROGRAM + 5)
    gradient, gradient_scale = tl.load(numbers), tl.load(numbers + 1)
    master_key, first_key, second_key = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    keep, step_size = _number(numbers, _KEEP), _number(numbers, _KEEP + 1)
    toward_first, toward_second = _number(numbers, _KEEP + 2), _number(numbers, _KEEP + 3)
    keep_second, inv_correction2 = _number(numbers, _KEEP + 4), _number(numbers, _KEEP + 5)
    inv_bound, eps = _number(numbers, _KEEP + 6), _number(numbers, _KEEP + 7)
    clip = tl.load(multiplier)

    lane = tl.arange(0, LANES)
    found = tl.zeros((BLOCKS,), tl.float32)
    master_flushed = tl.zeros((BLOCKS,), tl.int32)
    first_flushed = tl.zeros((BLOCKS,), tl.int32)
    second_flushed = tl.zeros((BLOCKS,), tl.int32)
    bits = tl.zeros((BLOCKS, LANES), tl.uint32)
    for tile in range(number, (blocks + BLOCKS - 1) // BLOCKS, programs):
        own = tl.arange(0, BLOCKS)
        block = tile * BLOCKS + own
        exists = block < blocks
        if RAGGED or CUT:
            per_row = (row + BLOCK - 1) // BLOCK
            line, column = block // per_row, block % per_row * BLOCK
        # Elements are a number plus a pattern of 32 bits.
        if RAGGED:
            begin = tile * BLOCKS
            start = begin // per_row * row + begin % per_row * BLOCK
            at = (line * row + column - start).to(tl.int32)[:, None] + lane[None, :]
            length = tl.minimum(row - column, BLOCK).to(tl.int32)
            inside = exists[:, None] & (lane[None, :] < length[:, None])
        else:
            start = tile * (BLOCKS * BLOCK)
            at = own[:, None] * BLOCK + lane[None, :]
            inside = exists[:, None] if LANES == BLOCK else exists[:, None] & (lane < BLOCK)[None, :]
        # Rows of FP8 gradients are padded to whole blocks.
        if GRADIENT == _WIDE or GRADIENT == _BF16:  # noqa: SIM109
            g = load_blocks(
                gradient, gradient_scale, start, at, inside, block, exists, GRADIENT, ALIGNED, HARDWARE
            )
        else:
            padded = own[:, None] * BLOCK + lane[None, :]
            first_code = tile * (BLOCKS * BLOCK)
            g = load_blocks(
                gradient,
                gradient_scale,
                first_code,
                padded,
                inside,
                block,
                exists,
                GRADIENT,
                ALIGNED,
                HARDWARE,
            )
        g = g * clip
        m = load_blocks(first, first_scale, start, at, inside, block, exists, FIRST, ALIGNED, HARDWARE)
        w = load_blocks(master, master_scale, start, at, inside, block, exists, MASTER, ALIGNED, HARDWARE)
        if MASTER_RANDOM or FIRST_RANDOM or SECOND_RANDOM:
            if CUT:
                logical = (line * logical_row + column + offset).to(tl.uint32)
                index = logical[:, None] + lane.to(tl.uint32)[None, :]
            else:
                index = (start + offset).to(tl.uint32) + at.to(tl.uint32)
        # The rule, one rounded operation at a time.
        if RULE == _ADAMW:
            v = load_blocks(second, second_scale, start, at, inside, block, exists, SECOND, ALIGNED, HARDWARE)
            if SECOND_ROOT:
                v = v * v
            m = _lerp(m, g, toward_first)
            v = v * keep_second + (g * toward_second) * g
            bounded = m * inv_bound
            root = tl.sqrt_rn(largest(v, bounded * bounded) * inv_correction2)
            w = w * keep + tl.div_rn(m * step_size, root + eps)
            new_v = tl.where(inside, v, 0.0)
            if SECOND_RANDOM:
                bits = random_bits(second_key, index)
            stored = _store(
                second,
                second_scale,
                tl.sqrt_rn(new_v) if SECOND_ROOT else new_v,
                bits,
                start,
                at,
                inside,
                block,
                exists,
                SECOND,
                SECOND_RANDOM,
                ALIGNED,
                HARDWARE,
            )
            if COUNT:
                second_flushed += _flushed(stored * stored if SECOND_ROOT else stored, new_v)
        else:
            direction = _lerp(m, g, toward_first)
            m = _lerp(m, g, toward_second)
            sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
            w = w * keep + sign * step_size
        # What lies outside would enter a block's amax.
        m = tl.where(inside, m, 0.0)
        w = tl.where(inside, w, 0.0)
        if FIRST_RANDOM:
            bits = random_bits(first_key, index)
        stored = _store(
            first,
            first_scale,
            m,
            bits,
            start,
            at,
            inside,
            block,
            exists,
            FIRST,
            FIRST_RANDOM,
            ALIGNED,
            HARDWARE,
        )
        if COUNT:
            first_flushed += _flushed(stored, m)
        if MASTER_RANDOM:
            bits = random_bits(master_key, index)
        stored = _store(
            master,
            master_scale,
            w,
            bits,
            start,
            at,
            inside,
            block,
            exists,
            MASTER,
            MASTER_RANDOM,
            ALIGNED,
            HARDWARE,
        )
        if COUNT:
            master_flushed += _flushed(stored, w)
        # The model gets the master as it was stored.
        if WEIGHT == _BF16:
            code = narrow(stored, HARDWARE)
            tl.store(_pointer(weight, tl.bfloat16, ALIGNED) + start + at, code, mask=inside)
            stored = widen(code, HARDWARE)
        elif WEIGHT == _WIDE:
            tl.store(_pointer(weight, tl.float32, ALIGNED) + start + at, stored, mask=inside)
        elif WEIGHT == _REMAINDER:
            half = ((stored.to(tl.int32, bitcast=True) + 0x8000) >> 16) << 16
            stored = half.to(tl.float32, bitcast=True)
        found = largest(found, largest_magnitude(stored, 1))

    # One number of this program, and zeros for programs that the parameter does not have.
    partials += parameter * width
    tl.store(partials + number, largest_magnitude(found, 0))
    if number == 0:
        others = tl.arange(0, MOST)
        tl.store(
            partials + others, tl.zeros((MOST,), tl.float32), mask=(others >= programs) & (others < width)
        )
    if COUNT:
        all_programs = tl.num_programs(0)
        tl.store(flushed + program, tl.sum(master_flushed, axis=0))
        tl.store(flushed + all_programs + program, tl.sum(first_flushed, axis=0))
        tl.store(flushed + 2 * all_programs + program, tl.sum(second_flushed, axis=0))


def optimizer_update(
    gradient: list[Tensor],
    gradient_scale: list[Tensor],
    master: list[Tensor],
    master_scale: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_scale: list[Tensor],
    exp_avg_sq: list[Tensor],
    exp_avg_sq_scale: list[Tensor],
    weight: list[Tensor],
    multiplier: Tensor,
    places: Tensor,
    numbers: Tensor,
    program_of: Tensor,
    signature: list[int],
    width: int,
) -> tuple[Tensor, Tensor]:
    """:data:`fp8train.kernels.optimizer_update.optimizer_update`: one launch for all parameters; the lists
    are what the addresses of the tables point to."""
    s = Signature(*signature)
    partials = places.new_empty((len(places), width), dtype=multiplier.dtype)
    flushed = program_of.new_empty((3 if s.counted else 0, len(program_of)))
    launch(
        _update_kernel,
        (len(program_of),),
        multiplier,
        places,
        numbers,
        program_of,
        partials,
        flushed,
        width,
        RULE=s.rule,
        GRADIENT=s.gradient,
        MASTER=s.master,
        MASTER_RANDOM=s.master_random,
        FIRST=s.exp_avg,
        FIRST_RANDOM=s.exp_avg_random,
        SECOND=s.exp_avg_sq,
        SECOND_RANDOM=s.exp_avg_sq_random,
        SECOND_ROOT=s.exp_avg_sq_root,
        WEIGHT=s.weight,
        BLOCK=s.block,
        RAGGED=s.ragged,
        CUT=s.cut,
        ALIGNED=s.aligned,
        COUNT=s.counted,
        BLOCKS=rows_of_a_tile(s.block),
        LANES=triton.next_power_of_2(s.block),
        MOST=triton.next_power_of_2(width),
        HARDWARE=hardware(),
        num_warps=4,
    )
    return partials, flushed
