"""Calls of every fused operation at the shapes of one layer of Llama-3-8B with 8,192 tokens: what is compiled
without a GPU, and measured on one.

A case is made of tensors without values on the meta device, so it costs nothing; ``filled`` gives it memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.kernels import scaling
from fp8train.kernels.group_operands import GroupRule
from fp8train.kernels.operands import CastRule
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.scale_blocks import Granularity

TOKENS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 8192, 4096, 14336, 32, 8, 128
X, GRADIENT = CastRule.of(QuantSpec(E4M3)), CastRule.of(QuantSpec(E5M2))


@dataclass(frozen=True)
class Case:
    """One call: an operation's name, what distinguishes the case, and its arguments."""

    operation: str
    variant: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.operation}[{self.variant}]"

    def filled(self, device: torch.device, *, scale: int = 1) -> tuple[Any, ...]:
        """The arguments in memory: floats of a normal distribution, bytes and integers of few bits; leading
        dimensions divided by ``scale``."""
        generator = torch.Generator(device).manual_seed(0)

        def fill(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            shape = (max(1, x.shape[0] // scale), *x.shape[1:]) if x.dim() > 1 else x.shape
            if x.dtype.is_floating_point and x.element_size() > 1:
                return torch.randn(shape, generator=generator, device=device).to(x.dtype)
            return torch.randint(1, 120, shape, generator=generator, device=device, dtype=torch.uint8).view(
                x.dtype
            )

        return tuple(fill(x) for x in self.arguments)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _operands() -> Iterator[Case]:
    x, partials = _empty(TOKENS, HIDDEN), _empty(1024, dtype=torch.float32)
    yield Case("amax_partials", "bf16", (x,))
    yield Case("cast_operand", "x", (x, partials, None, *X, True, True))
    yield Case("cast_operand", "grad_output", (x, partials, None, *GRADIENT, True, True))
    yield Case("turn_codes", "weight", (_empty(FFN, HIDDEN, dtype=torch.float8_e4m3fn),))
    delayed = _empty(dtype=torch.float32)
    yield Case("cast_operand", "x, delayed", (x, partials, delayed, *X, True, True))


def _group_operands() -> Iterator[Case]:
    x = _empty(TOKENS, HIDDEN)
    granularities: tuple[Granularity, ...] = ("row", "block_1x128", "mx_1x32", "block_128x128")
    for name in granularities:
        rule = GroupRule.of(QuantSpec(E4M3, name))
        directed = name != "block_128x128"
        yield Case("cast_groups", f"{name}, along rows", (x, *rule, 1, True, not directed))
        if directed:
            yield Case("cast_groups", f"{name}, along columns", (x, *rule, 0, False, True))
            yield Case("cast_both", name, (x, *rule))
    free = GroupRule.of(QuantSpec(E5M2, "block_1x128", power_of_two=False))
    yield Case("cast_both", "block_1x128, fp32 scales", (x, *free))


def _scale_layouts() -> Iterator[Case]:
    yield Case(scaling.mx_scales.__name__, "x", (_empty(TOKENS, HIDDEN // 32, dtype=torch.float32),))
    yield Case("square_scales", "w", (_empty(FFN // 128, HIDDEN // 128, dtype=torch.float32),))


_GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (_operands, _group_operands, _scale_layouts)


def cases() -> list[Case]:
    """All cases; every operation has one."""
    return [case for group in _GROUPS for case in group()]
