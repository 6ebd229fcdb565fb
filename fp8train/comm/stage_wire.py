"""States between two pipeline stages as FP8 codes with block scales.

A stage sends its states as E4M3, and gets their gradient back as E5M2, which has the range that gradients
need. Each block of a row has a power-of-two scale of its own, so there is no state to keep, and a block that
is not finite stays visible (its scale is NaN). The cost is one rounding in forward and one in backward per
boundary: check the loss.

The library that moves states between stages wants the gradient of what it sent to have its shape and dtype,
and autograd knows no gradient of bytes. So codes and scales travel as the *bits* of an FP32 tensor, a
carrier, which has the same size both ways. Nothing ever computes with a carrier.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fp8train.numerics.block_scales import as_blocks, dequantize_blocks, from_blocks, quantize_blocks
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.scale_blocks import block_size


class StageWire:
    """Encodes states of one shape and dtype for the way to another pipeline stage.

    Attributes:
        carrier_shape: of what travels, FP32.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype, self._block = shape, dtype, block_size(shape[-1])
        self._blocks = math.prod(shape[:-1]) * -(-shape[-1] // self._block)
        self.carrier_shape = (-(-self._blocks * (self._block + 1) // 4),)

    def encode(self, states: Tensor, fmt: Format) -> Tensor:
        """Quantise states of the wire's shape and pack codes and scales into a carrier, FP32
        [carrier_shape]."""
        payload, scales = quantize_blocks(as_blocks(states, self._block), fmt)
        message = torch.cat((payload.view(torch.uint8).view(-1), scales))
        padding = 4 * self.carrier_shape[0] - message.numel()
        return torch.nn.functional.pad(message, (0, padding)).view(torch.float32)

    def decode(self, carrier: Tensor, fmt: Format) -> Tensor:
        """Unpack and dequantise a carrier: states of the wire's shape and dtype."""
        message = carrier.view(torch.uint8)
        codes = self._blocks * self._block
        payload = message[:codes].view(dtype_of(fmt)).view(self._blocks, self._block)
        values = dequantize_blocks(payload, message[codes : codes + self._blocks])
        return from_blocks(values, self._shape).to(self._dtype)

    def pack(self, states: Tensor) -> Tensor:
        """Turn states into a carrier in E4M3, differentiably. Its gradient is a carrier in E5M2."""
        return _Pack.apply(states, self)

    def unpack(self, carrier: Tensor) -> Tensor:
        """Turn a carrier back into states, differentiably. Their gradient leaves as a carrier in E5M2."""
        return _Unpack.apply(carrier, self)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, wire: StageWire) -> Tensor:
        ctx.wire = wire
        return wire.encode(states, E4M3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.decode(grads[0], E5M2), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, wire: StageWire) -> Tensor:
        ctx.wire = wire
        return wire.decode(carrier, E4M3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.encode(grads[0], E5M2), None
