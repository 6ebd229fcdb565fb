"""One optimizer step of many parameters in one launch, over all storage formats.

Of each element the kernel decodes gradient and states, computes the update rule in FP32, encodes the new
states, and rounds the new weight from the master *as it was stored*::

    gradient · multiplier, m, v, w  →  m, v, w by the rule  →  codes and scales  →  weight, its amax

So a step reads and writes each byte once. A block's scale comes from the block itself, which a program holds
whole. What has one scale per tensor, a range to expand, or needs whole matrices takes the pass in chunks
(:mod:`fp8train.optim.optimizer`).

Parameters that are stored alike have one *signature* and are updated together. The kernel finds a
parameter's memory in a table of addresses (``places``, written once), and the step's numbers in another
(``numbers``, one small copy per step). A parameter has at most :data:`PARTIALS` programs, each of which
leaves one number: the largest magnitude of the new weights that it wrote.

The arithmetic is the reference below, one rounded operation at a time; numbers of the rules are FP32. torch's
own kernels fuse some products and sums on some devices, so the pass in chunks may differ in the last place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp8train.kernels.fused_op import Cost, FusedOp, nbytes
from fp8train.numerics.block_scales import (
    as_blocks,
    decode_e8m0,
    from_blocks,
    quantize_blocks,
    quantize_blocks_stochastic,
)
from fp8train.numerics.cast import amax_of, decode_finite
from fp8train.numerics.remainder import join_remainder, split_remainder
from fp8train.numerics.stochastic import random_bits_in_rows, round_mantissa
from fp8train.precision.number_formats import E4M3, E5M2, FP16, Format

PARTIALS = 1024
"""Most programs of a parameter."""
TILE = 1024
"""Elements that a program holds at once."""
RULES = ("adamw", "lion")
"""The update rules that the kernel knows; a signature has their position."""

WIDE, BFLOAT16, REMAINDER, NOTHING = 23, 7, 16, 0
"""Storage formats beside block-scaled ones, told by mantissa bits as those: FP32; BF16; BF16 and the bits
that it lacks; none at all."""
SCALED: Mapping[int, Format] = {fmt.mantissa_bits: fmt for fmt in (FP16, E4M3, E5M2)}
"""Block-scaled formats by mantissa bits."""

NUMBERS = (
    "gradient",  # address
    "gradient_scale",  # address
    "master_key",
    "exp_avg_key",
    "exp_avg_sq_key",
    "keep",
    "step_size",
    "toward_first",
    "toward_second",
    "keep_second",
    "inv_correction2",
    "inv_bound",
    "eps",
)
"""Columns of the step's table: addresses, 32-bit keys of random bits, and from ``keep`` on FP32 numbers as
their bits. What those mean is said by :func:`_adamw` and :func:`_lion`."""
PLACES = (
    "master",
    "master_scale",
    "exp_avg",
    "exp_avg_scale",
    "exp_avg_sq",
    "exp_avg_sq_scale",
    "weight",
    "first_program",
    "programs",
    "blocks",
    "row",
    "offset",
    "logical_row",
    "numel",
)
"""Columns of the static table: addresses; programs of the kernel; blocks, elements of a row that they cut;
logical index of the first element, elements of a logical row (``row`` where rows are whole); elements.
``*_scale`` of a remainder is its lower half."""

_FIRST_FLOAT = NUMBERS.index("keep")


class Signature(NamedTuple):
    """What parameters of one launch have in common.

    Attributes:
        rule: position in :data:`RULES`.
        gradient: mantissa bits of its format.
        master: likewise.
        master_random: whether it is rounded stochastically.
        exp_avg: as of the master.
        exp_avg_random: as of the master.
        exp_avg_sq: as of the master; ``NOTHING`` where the rule keeps none.
        exp_avg_sq_random: as of the master.
        exp_avg_sq_root: whether its root is stored.
        weight: what is written beside the states: ``BFLOAT16``, ``WIDE``, or ``NOTHING``; ``REMAINDER`` where
            the weight is the upper half of the master.
        block: elements of a block of a row.
        ragged: whether rows end in a short block.
        cut: whether a local row is a part of a logical one.
        aligned: whether all addresses are multiples of 16.
        counted: whether to count values that were stored as zero and were not.
    """

    rule: int
    gradient: int
    master: int
    master_random: int
    exp_avg: int
    exp_avg_random: int
    exp_avg_sq: int
    exp_avg_sq_random: int
    exp_avg_sq_root: int
    weight: int
    block: int
    ragged: int
    cut: int
    aligned: int
    counted: int


def rows_of_a_tile(block: int) -> int:
    """How many blocks a program holds at once: a power of two."""
    lanes = 1 << (block - 1).bit_length()
    return max(1, TILE // lanes)


def count_of_programs(blocks: int, block: int) -> int:
    """How many programs a parameter has: 1 to :data:`PARTIALS`."""
    return max(1, min(PARTIALS, -(-blocks // rows_of_a_tile(block))))


def float_bits(value: float) -> int:
    """A number rounded to FP32, as the bits that :data:`NUMBERS` hold."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


class _Numbers(NamedTuple):
    """The step's numbers of one parameter for its rule: FP32 values."""

    keep: float
    step_size: float
    toward_first: float
    toward_second: float
    keep_second: float
    inv_correction2: float
    inv_bound: float
    eps: float


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """From ``start`` to ``end``, from the nearer of them, as torch's."""
    if weight < 0.5:
        return start + (end - start) * weight
    return end - (end - start) * float(1 - torch.tensor(weight, dtype=torch.float32))


def _sqrt(x: Tensor) -> Tensor:
    """The rounded root of FP32 values; torch's on a CPU may be the number next to it."""
    return x.double().sqrt().float()


def _adamw(g: Tensor, m: Tensor, v: Tensor, w: Tensor, n: _Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """New (m, v, w). ``toward_first`` is 1-β1, ``toward_second`` 1-β2, ``keep_second`` β2, ``keep`` what
    decay leaves of w, ``step_size`` -η/(1-β1^t), ``inv_correction2`` 1/(1-β2^t), ``inv_bound`` one over the
    largest ratio of ``|m|`` to ``sqrt(v)``, or 0."""
    m = _lerp(m, g, n.toward_first)
    v = v * n.keep_second + (g * n.toward_second) * g
    root = _sqrt(v.maximum((m * n.inv_bound).square()) * n.inv_correction2)
    return m, v, w * n.keep + (m * n.step_size) / (root + n.eps)


def _lion(g: Tensor, m: Tensor, w: Tensor, n: _Numbers) -> tuple[Tensor, Tensor]:
    """New (m, w). ``toward_first`` is 1-β1, of the direction; ``toward_second`` 1-β2, of the moment;
    ``step_size`` -η; ``keep`` what decay leaves of w."""
    direction = _lerp(m, g, n.toward_first).sign()
    return _lerp(m, g, n.toward_second), w * n.keep + direction * n.step_size


class _State(NamedTuple):
    """One role of one parameter: codes, block scales or a lower half, format, rounding, the key of its random
    bits, and whether it is a root."""

    payload: Tensor
    scale: Tensor | None
    mantissa: int
    random: bool = False
    key: int = 0
    root: bool = False


class _Place(NamedTuple):
    """Rows and blocks of one parameter, and its place in the logical tensor."""

    block: int
    row: int
    offset: int
    logical_row: int
    numel: int

    def blocks(self, flat: Tensor) -> Tensor:
        """Flat elements as [blocks, block]."""
        return as_blocks(flat.view(-1, self.row), self.block)

    def flat(self, blocks: Tensor) -> Tensor:
        """The inverse of :meth:`blocks`."""
        return from_blocks(blocks, (self.numel // self.row, self.row)).reshape(-1)

    def bits(self, key: int, device: torch.device) -> Tensor:
        """Random bits of all elements: int32, flat."""
        rows = {"row": self.row, "logical_row": self.logical_row, "offset": self.offset}
        return random_bits_in_rows(key, 0, self.numel, **rows, device=device)


def _decode(state: _State, place: _Place) -> Tensor:
    """Values of a state or gradient: FP32, flat, a new tensor."""
    payload = state.payload.reshape(-1)
    if state.mantissa in SCALED:
        assert state.scale is not None
        codes = payload.float() if payload.element_size() == 2 else decode_finite(payload, torch.float32)
        in_blocks = len(payload) == state.scale.numel() * place.block
        blocks = codes.view(-1, place.block) if in_blocks else place.blocks(codes)
        values = place.flat(blocks * decode_e8m0(state.scale.reshape(-1)).unsqueeze(-1))
    elif state.mantissa == REMAINDER:
        assert state.scale is not None
        values = join_remainder(payload.view(torch.int16), state.scale.reshape(-1))
    else:
        values = payload.float().clone()
    return values.square() if state.root else values


def decode_stored(payload: Tensor, scale: Tensor | None, mantissa: int, block: int) -> Tensor:
    """Values of a stored matrix [rows, K]: FP32, flat. ``scale``, ``mantissa``, ``block``: of its format."""
    place = _Place(block, payload.shape[-1], 0, payload.shape[-1], payload.numel())
    return _decode(_State(payload, scale, mantissa), place)


def _encode(state: _State, place: _Place, values: Tensor) -> Tensor:
    """Store new values, FP32 and flat; returns what the state is now."""
    if state.root:
        values = _sqrt(values)
    payload = state.payload.view(-1)
    bits = place.bits(state.key, values.device) if state.random else None
    if state.mantissa in SCALED:
        assert state.scale is not None
        blocks, fmt = place.blocks(values), SCALED[state.mantissa]
        if bits is None:
            codes, scale = quantize_blocks(blocks, fmt)
        else:
            codes, scale = quantize_blocks_stochastic(blocks, fmt, place.blocks(bits))
        payload.copy_(place.flat(codes))
        state.scale.view(-1).copy_(scale)
    elif state.mantissa == REMAINDER:
        assert state.scale is not None
        high, low = split_remainder(values)
        payload.view(torch.int16).copy_(high)
        state.scale.view(-1).copy_(low)
    else:
        payload.copy_(values if bits is None else round_mantissa(values, 16, bits))
    return _decode(state, place)


def _optimizer_update(
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
    s = Signature(*signature)
    partials = multiplier.new_zeros((len(places), width))
    flushed = program_of.new_zeros((3 if s.counted else 0, len(program_of)))
    values = numbers[:, _FIRST_FLOAT:].to(torch.int32).view(torch.float32).tolist()
    for i, (place_row, number_row) in enumerate(zip(places.tolist(), numbers.tolist(), strict=True)):
        where = dict(zip(PLACES, place_row, strict=True))
        keys = dict(zip(NUMBERS, number_row, strict=True))
        place = _Place(s.block, *(where[name] for name in _Place._fields[1:]))
        states = [
            _State(master[i], _at(master_scale, i), s.master, bool(s.master_random), keys["master_key"]),
            _State(exp_avg[i], _at(exp_avg_scale, i), s.exp_avg, bool(s.exp_avg_random), keys["exp_avg_key"]),
        ]
        if s.exp_avg_sq != NOTHING:
            rounding = bool(s.exp_avg_sq_random), keys["exp_avg_sq_key"], bool(s.exp_avg_sq_root)
            states += [_State(exp_avg_sq[i], _at(exp_avg_sq_scale, i), s.exp_avg_sq, *rounding)]
        g = _decode(_State(gradient[i], _at(gradient_scale, i), s.gradient), place) * multiplier
        w, m, *v = (_decode(state, place) for state in states)
        if RULES[s.rule] == "adamw":
            m, v[0], w = _adamw(g, m, v[0], w, _Numbers(*values[i]))
        else:
            m, w = _lion(g, m, w, _Numbers(*values[i]))
        for role, (state, new) in enumerate(zip(states, (w, m, *v), strict=True)):
            stored = _encode(state, place, new)
            if s.counted:
                flushed[role, where["first_program"]] = ((stored == 0) & (new != 0)).sum()
        published = _publish(s, _decode(states[0], place), master[i], _at(weight, i))
        partials[i, 0] = amax_of(published)
    return partials, flushed


def _at(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    return tensors[i] if tensors else None


def _publish(s: Signature, stored: Tensor, master: Tensor, weight: Tensor | None) -> Tensor:
    """Write the weight; returns the values that the model gets."""
    if s.weight == REMAINDER:
        return master
    if weight is None:
        return stored
    weight.view(-1).copy_(stored)
    return weight


def _results(*args: Any) -> tuple[Tensor, Tensor]:
    places, _, program_of, signature, width = args[10:]
    partials = places.new_empty((len(places), width), dtype=torch.float32)
    roles = 3 if Signature(*signature).counted else 0
    return partials, places.new_empty((roles, len(program_of)), dtype=torch.int32)


def _cost(args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> Cost:
    gradients, states, weights = args[:2], [t for role in args[2:8] for t in role], args[8]
    read = nbytes(*(t for part in gradients for t in part), *states, *args[9:13])
    return Cost(1, read, nbytes(*states, *weights, *out))


optimizer_update = FusedOp(
    _optimizer_update,
    launcher="fp8train.kernels.gpu.optimizer_update:optimizer_update",
    fake=_results,
    cost=_cost,
    mutates=(
        "master",
        "master_scale",
        "exp_avg",
        "exp_avg_scale",
        "exp_avg_sq",
        "exp_avg_sq_scale",
        "weight",
    ),
)
"""Update parameters of one signature in place.

Args:
    gradient: of each parameter, contiguous: FP32, BF16, or FP8 [blocks, block] (rows padded to whole blocks).
    gradient_scale: E8M0 bytes of those blocks; no entries for other formats.
    master: codes or values, contiguous; likewise ``exp_avg`` and ``exp_avg_sq`` (no entries under Lion).
    master_scale: E8M0 bytes of its blocks, or lower halves; likewise for the moments. No entries for formats
        without any.
    weight: memory of new weights beside the states, contiguous; no entries where nothing is written.
    multiplier: FP32 scalar that multiplies every gradient.
    places: int64 [parameters, PLACES].
    numbers: int64 [parameters, NUMBERS].
    program_of: int32 [programs], the parameter of each program.
    signature: of :class:`Signature`.
    width: most programs of a parameter.

Returns:
    (FP32 [parameters, width], whose rows have the largest magnitude of each new weight, NaN if it has one: of
    the weight as written, or of the master as stored where none is; int32 [3, programs], whose rows add up to
    the elements of master and moments that were stored as zero and were not, empty unless they are counted).
"""
