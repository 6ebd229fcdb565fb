"""States in FP16 or FP8 with scales: per block, per tensor, per block with an expanded range, or as a root.

A scale is a power of two, as large as the amax of its group allows (:mod:`fp8train.numerics.scale`). So
nothing saturates, a group of zeros has scale 1, and a scale that moves loses nothing but subnormals.

**Blocks** lie within a chunk: amax is known before anything is stored, one pass over memory is enough, and
the result depends neither on the chunk nor on who holds the other rows. That is why FP16 states have block
scales too by default, for 1/128 byte. A scale per tensor, kept until amax leaves a window, would also be one
pass, but a second moment that starts at zero, or jumps by more than the headroom, would flush or saturate
within the very step that moves it.

**Per tensor** (FP8-LM) takes two passes: amax of the new values first, then the new values again, stored.

**Expanded range** (after COAT, arXiv:2410.19313, section 4). A block of moments spans fewer binades than the
format, or more. With c its largest and a its smallest non-zero magnitude, it is stored as ::

    q = cast(sign(x) · max · (|x| / c)^k)         x ≈ sign(q) · c · (|q| / max)^(1/k)
    k = log(max² / 2) / log(c / a),  rounded down to 1/16, within [1/2, 8]

so c becomes the format's largest value and a lands a bit above its smallest; relative errors shrink by k, or
grow where k < 1 saves small values from zero. Two things differ from COAT: zeros do not enter the minimum
(one exact zero would make k collapse for the whole block) and stay zeros; and c and k replace its three
numbers, as its scale is a function of them. c stays FP32: rounded up to BF16 it would stop the decay of a
block's largest element. 5 bytes per block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8train.numerics.block_scales import (
    as_blocks,
    decode_e8m0,
    from_blocks,
    quantize_blocks,
    quantize_blocks_stochastic,
)
from fp8train.numerics.cast import cast, decode_finite
from fp8train.numerics.formats import dtype_of
from fp8train.numerics.scale import exponent_from_amax, power_of_two
from fp8train.numerics.stochastic import cast_stochastic
from fp8train.optim.state_storage import StatePlace, Storage, Stored
from fp8train.precision.number_formats import Format

_POWER_UNIT = 16
_MIN_POWER, _MAX_POWER = _POWER_UNIT // 2, _POWER_UNIT * 8
_SCALE_ONE = 127  # E8M0 byte of 2^0


def _decode(payload: Tensor) -> Tensor:
    """FP32 values of finite codes; a new tensor."""
    return payload.float() if payload.dtype == torch.float16 else decode_finite(payload, torch.float32)


class _ScaledStorage(Storage):
    """A payload of one code per element."""

    def __init__(self, place: StatePlace, fmt: Format) -> None:
        super().__init__(place)
        self.format = fmt
        self.payload = place.new(place.shape, dtype_of(fmt))
        self._flat = self.payload.view(-1)

    def _write(self, start: int, stop: int, payload: Tensor) -> None:
        self._flat[start:stop] = payload


class _BlockedStorage(_ScaledStorage):
    """Chunks seen as matrices of blocks; rows that end in a short block are padded with zeros."""

    def _blocks(self, flat: Tensor) -> Tensor:
        row, block = self.place.row, self.place.block
        return flat.view(-1, block) if row % block == 0 else as_blocks(flat.view(-1, row), block)

    def _flatten(self, blocks: Tensor, count: int) -> Tensor:
        if self.place.row % self.place.block == 0:
            return blocks.view(-1)
        rows = count // self.place.row
        return from_blocks(blocks, (rows, self.place.row)).reshape(-1)

    def _span(self, start: int, stop: int) -> slice:
        """The blocks of flat elements ``start .. stop``."""
        row, block = self.place.row, self.place.block
        if row % block == 0:
            return slice(start // block, stop // block)
        per_row = -(-row // block)
        return slice(start // row * per_row, stop // row * per_row)

    def _bits(self, key: int, start: int, stop: int) -> Tensor:
        return self._blocks(self.place.bits(key, start, stop - start))


class BlockStorage(_BlockedStorage):
    """FP16, E4M3 or E5M2 with one E8M0 scale per block."""

    def __init__(self, place: StatePlace, fmt: Format) -> None:
        super().__init__(place, fmt)
        self.scale = place.new(place.scale_shape, torch.uint8, _SCALE_ONE)
        self._flat_scale = self.scale.view(-1)

    def load(self, start: int, stop: int) -> Tensor:
        """Decode elements ``start .. stop``, each with the scale of its block: FP32 [stop - start], a new
        tensor."""
        values = self._blocks(_decode(self._flat[start:stop]))
        values.mul_(decode_e8m0(self._flat_scale[self._span(start, stop)]).unsqueeze(-1))
        return self._flatten(values, stop - start)

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Give each block the power-of-two scale that its amax allows, and encode it: to nearest, or
        stochastically with a key."""
        blocks = self._blocks(values.float())
        if key is None:
            payload, scale = quantize_blocks(blocks, self.format)
        else:
            payload, scale = quantize_blocks_stochastic(blocks, self.format, self._bits(key, start, stop))
        self._write(start, stop, self._flatten(payload, stop - start))
        self._flat_scale[self._span(start, stop)] = scale

    def stored(self) -> Stored:
        """Codes and scales of blocks."""
        return Stored(self.format.mantissa_bits, self.payload, self.scale)

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: ``.payload``, codes of the tensor's shape, and ``.scale``, E8M0 bytes [.., blocks
        of a row]."""
        return {".payload": self.payload, ".scale": self.scale}


class TensorStorage(_ScaledStorage):
    """FP16, E4M3 or E5M2 with one power-of-two scale for the tensor; two passes."""

    two_pass = True

    def __init__(self, place: StatePlace, fmt: Format) -> None:
        super().__init__(place, fmt)
        self.scale_inv = place.new((), torch.float32, 1)
        self._new_exponent = torch.zeros((), dtype=torch.int32, device=place.device)

    def load(self, start: int, stop: int) -> Tensor:
        """Decode elements ``start .. stop`` with the tensor's scale: FP32 [stop - start], a new tensor."""
        return _decode(self._flat[start:stop]).mul_(self.scale_inv)

    def begin(self, amax: Tensor) -> None:
        """Choose the new scale from the amax of all new values (FP32 scalar); reads use the old one until
        :meth:`end`."""
        self._new_exponent = exponent_from_amax(amax, max_exponent=self.format.max_exponent)

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Encode new values with the scale that :meth:`begin` chose: to nearest, or stochastically with a
        key."""
        scale = power_of_two(self._new_exponent)
        if key is None:
            payload = cast(values.float(), self.format, scale, scale_is_power_of_two=True)
        else:
            bits = self.place.bits(key, start, stop - start)
            payload = cast_stochastic(values, self.format, scale, bits)
        self._write(start, stop, payload)

    def end(self) -> None:
        """Let reads use the new scale, now that every element was stored with it."""
        self.scale_inv.copy_(power_of_two(-self._new_exponent))

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: ``.payload``, codes of the tensor's shape, and ``.scale_inv``, an FP32 scalar."""
        return {".payload": self.payload, ".scale_inv": self.scale_inv}


class ExpandedStorage(_BlockedStorage):
    """E4M3 or E5M2 blocks whose range of magnitudes is stretched over the format's.

    Stochastic rounding is unbiased before the root of decoding, not after: it draws values slightly towards
    zero.
    """

    def __init__(self, place: StatePlace, fmt: Format) -> None:
        super().__init__(place, fmt)
        self.amax = place.new(place.scale_shape, torch.float32, 1)
        self.power = place.new(place.scale_shape, torch.uint8, _POWER_UNIT)
        self._flat_amax, self._flat_power = self.amax.view(-1), self.power.view(-1)
        self._range = math.log2(fmt.max**2 / 2)

    def load(self, start: int, stop: int) -> Tensor:
        """Decode elements ``start .. stop``: take the root of each code's magnitude and multiply by its
        block's amax. FP32 [stop - start], a new tensor."""
        span = self._span(start, stop)
        codes = self._blocks(_decode(self._flat[start:stop]))
        return self._flatten(self._values(codes, self._flat_amax[span], self._flat_power[span]), stop - start)

    def _values(self, codes: Tensor, amax: Tensor, power: Tensor) -> Tensor:
        """Decode blocks of codes, FP32, which are overwritten."""
        codes = codes.mul_(1.0 / self.format.max)
        root = (_POWER_UNIT / power.float()).unsqueeze(-1)
        magnitude = codes.abs().log2_().mul_(root).exp2_().mul_(amax.unsqueeze(-1))
        return torch.copysign(magnitude, codes, out=magnitude)

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Stretch each block's magnitudes over the range of the format and cast them: to nearest, or
        stochastically with a key."""
        blocks = self._blocks(values.float())
        magnitude = blocks.abs()
        amax, power = self._describe(magnitude)
        bits = None if key is None else self._bits(key, start, stop)
        payload = self._encode(blocks, amax, power, bits, magnitude)
        self._write(start, stop, self._flatten(payload, stop - start))
        span = self._span(start, stop)
        self._flat_amax[span], self._flat_power[span] = amax, power

    def _encode(
        self,
        blocks: Tensor,
        amax: Tensor,
        power: Tensor,
        bits: Tensor | None = None,
        magnitude: Tensor | None = None,
    ) -> Tensor:
        """Codes of blocks; ``magnitude``: theirs, to be overwritten."""
        magnitude = blocks.abs() if magnitude is None else magnitude
        exponent = (power.float() / _POWER_UNIT).unsqueeze(-1)
        # log2(0) is -inf and exp2 takes it back to 0
        magnitude.div_(amax.unsqueeze(-1)).log2_().mul_(exponent).exp2_().mul_(self.format.max)
        torch.copysign(magnitude, blocks, out=magnitude)
        one = torch.ones((), device=magnitude.device)
        if bits is None:
            return cast(magnitude, self.format, one)
        return cast_stochastic(magnitude, self.format, one, bits)

    def _meets(self, blocks: Tensor, amax: Tensor, power: Tensor) -> Tensor:
        """Which blocks come back as they are from codes with this exponent."""
        return (self._values(_decode(self._encode(blocks, amax, power)), amax, power) == blocks).all(dim=-1)

    def restore(self, start: int, stop: int, values: Tensor) -> None:
        """:meth:`store` decoded values. The smallest one of a block tells its exponent but roughly, so blocks
        whose values are not met try the exponents around it."""
        blocks = self._blocks(values.float())
        span = self._span(start, stop)
        amax, guess = self._describe(blocks.abs())
        best = guess.clone()
        found = torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
        for step in range(_MAX_POWER - _MIN_POWER + 1):
            for power in (guess.int() + step, guess.int() - step):
                power = power.clamp(_MIN_POWER, _MAX_POWER).to(torch.uint8)
                met = ~found & self._meets(blocks, amax, power)
                best[met], found = power[met], found | met
            if bool(found.all()):
                break
        payload = self._encode(blocks, amax, best)
        self._write(start, stop, self._flatten(payload, stop - start))
        self._flat_amax[span], self._flat_power[span] = amax, best

    def _describe(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """(c FP32, 16·k uint8) of blocks; a block of zeros has c = 1."""
        amax = magnitude.amax(dim=-1)
        smallest = torch.where(magnitude == 0, torch.inf, magnitude).amin(dim=-1)
        amax = torch.where(amax == 0, 1.0, amax)
        binades = (amax / smallest).log2_().clamp_(min=0.0)
        power = (_POWER_UNIT * self._range / binades).clamp_(_MIN_POWER, _MAX_POWER).floor_()
        return amax, power.to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: ``.payload``, codes of the tensor's shape; ``.amax`` FP32 and ``.power`` (16·k)
        uint8 [.., blocks of a row]."""
        return {".payload": self.payload, ".amax": self.amax, ".power": self.power}


class RootStorage(Storage):
    """The square root of a state that is never negative, in another storage.

    Stochastic rounding is unbiased for the root: the square gains its variance, 0.14 % for E4M3.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner.place)
        self.inner = inner
        self.two_pass = inner.two_pass

    def load(self, start: int, stop: int) -> Tensor:
        """Decode the roots of elements ``start .. stop`` and square them."""
        return self.inner.load(start, stop).square_()

    def begin(self, amax: Tensor) -> None:
        """Announce the amax of all new values to the storage of the roots."""
        self.inner.begin(amax.sqrt())

    def store(self, start: int, stop: int, values: Tensor, key: int | None) -> None:
        """Store the roots of new values, which must not be negative."""
        self.inner.store(start, stop, values.sqrt(), key)

    def restore(self, start: int, stop: int, values: Tensor) -> None:
        """Restore the roots of decoded values."""
        self.inner.restore(start, stop, values.sqrt())

    def end(self) -> None:
        """Tell the storage of the roots that every element was stored."""
        self.inner.end()

    def stored(self) -> Stored | None:
        """The memory of the roots."""
        inner = self.inner.stored()
        return None if inner is None else inner._replace(root=True)

    def tensors(self) -> dict[str, Tensor]:
        """For checkpoints: the tensors of the roots, under the names of the inner format."""
        return self.inner.tensors()
