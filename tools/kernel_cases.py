"""Calls of every fused operation at the shapes of one layer of Llama-3-8B with 8,192 tokens: what is compiled
without a GPU, and measured on one.

A case is made of tensors without values on the meta device, so it costs nothing; ``filled`` gives it memory.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fp8train.kernels
from fp8train.kernels.operands import CastRule
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec

for _module in pkgutil.iter_modules(fp8train.kernels.__path__):  # operations are declared when imported
    if not _module.ispkg:
        importlib.import_module(f"fp8train.kernels.{_module.name}")

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
        """The arguments in memory: floats of a normal distribution, bytes and integers of few bits.

        Leading sizes of matrices are divided by ``scale``, and so is what else counts the same: statistics of
        rows, but no last dimension of a matrix, and no weight (BF16, one dimension).
        """
        generator = torch.Generator(device).manual_seed(0)
        tensors = [x for x in self.arguments if isinstance(x, Tensor)]
        counted = {x.shape[0] for x in tensors if x.dim() > 1}

        def shape_of(x: Tensor) -> list[int]:
            kept = 0 if x.dim() == 1 and x.dtype != torch.bfloat16 else 1
            cut = x.dim() - kept
            return [max(1, n // scale) if i < cut and n in counted else n for i, n in enumerate(x.shape)]

        def fill(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # dimensions in the order in which they lie in memory
            order = sorted(range(x.dim()), key=lambda i: -x.stride(i))
            sizes = shape_of(x)
            shape = [sizes[i] for i in order]
            if x.dtype.is_floating_point and x.element_size() > 1:
                value = torch.randn(shape, generator=generator, device=device).to(x.dtype)
            else:
                value = torch.randint(1, 120, shape, generator=generator, device=device, dtype=torch.uint8)
                value = value.view(x.dtype)
            return value.permute([order.index(i) for i in range(x.dim())])

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


def _norms() -> Iterator[Case]:
    x, weight = _empty(TOKENS, HIDDEN), _empty(HIDDEN)
    rstd, partials = (_empty(size, dtype=torch.float32) for size in (TOKENS, 1024))
    for kind, mean, bias in (("rms", None, None), ("layer", rstd, weight)):
        rest = (weight, bias, 1e-5, kind)
        yield Case("residual_norm", f"{kind}, amax", (x, x, *rest, False, True))
        yield Case("residual_norm", f"{kind}, y", (x, x, *rest, True, False))
        yield Case("norm_cast", kind, (x, mean, rstd, weight, bias, partials, None, *X, True, True))
        yield Case("norm_backward", kind, (x, x, x, mean, rstd, weight, bias is not None))
    yield Case("norm_forward", "rms", (x, None, rstd, weight, None))
    yield Case("norm_amax", "rms", (x, None, rstd, weight, None))
    heads, gain = _empty(TOKENS * HEADS, HEAD_DIM), _empty(HEAD_DIM)
    inverse = _empty(TOKENS * HEADS, dtype=torch.float32)
    yield Case("residual_norm", "heads", (heads, None, gain, None, 1e-5, "rms", True, False))
    yield Case("norm_backward", "heads", (heads, None, heads, None, inverse, gain, False))
    for width in (8192, 16384):
        wide, gain = _empty(TOKENS, width), _empty(width)
        yield Case("residual_norm", str(width), (wide, wide, gain, None, 1e-5, "rms", False, True))
        yield Case("norm_backward", str(width), (wide, wide, wide, None, rstd, gain, False))
        yield Case("norm_backward", f"layer {width}", (wide, wide, wide, rstd, rstd, gain, True))


def _heads() -> Iterator[Case]:
    qkv = _empty(1, TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    table = _empty(TOKENS, HEAD_DIM // 2, dtype=torch.float32)
    yield Case("split_heads", "rotated", (qkv, table, table, KV_HEADS, HEAD_DIM))
    yield Case("split_heads", "plain", (qkv, None, None, KV_HEADS, HEAD_DIM))


def _activations() -> Iterator[Case]:
    fused, h, partials = _empty(TOKENS, 2 * FFN), _empty(TOKENS, FFN), _empty(1024, dtype=torch.float32)
    for name, inputs, inputs_grad in (
        ("swiglu", (fused, 128, 1.0, 1.0), (fused, h, 128, 1.0, 1.0)),
        ("gelu", (h, False, 1.0, 1.0), (h, h, False, 1.0, 1.0)),
        ("gelu", (h, True, 1.0, 1.0), (h, h, True, 1.0, 1.0)),
    ):
        variant = "tanh" if inputs[1] is True else "bf16"
        yield Case(f"{name}_forward", variant, inputs)
        yield Case(f"{name}_amax", variant, inputs)
        yield Case(f"{name}_cast", variant, (*inputs, partials, None, *X, True, True))
        yield Case(f"{name}_backward", variant, inputs_grad)
        yield Case(f"{name}_grad_amax", variant, inputs_grad)
        yield Case(f"{name}_grad_cast", variant, (*inputs_grad, partials, None, *GRADIENT, True, True))


def _rotary() -> Iterator[Case]:
    batch, length = 2, TOKENS // 2
    cos = _empty(length, HEAD_DIM // 2, dtype=torch.float32)
    qkv = _empty(batch, length, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    yield Case("rotate_heads", "bf16", (qkv, cos, cos, KV_HEADS, HEAD_DIM))
    query, key = (_empty(batch, length, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    inputs, partials = (query, key, key, cos, cos), _empty(1024, dtype=torch.float32)
    yield Case("heads_grad_forward", "bf16", inputs)
    yield Case("heads_grad_amax", "bf16", inputs)
    yield Case("heads_grad_cast", "bf16", (*inputs, partials, None, *GRADIENT, True, True))
    merged = (query, key, key, None, None, partials, None, *GRADIENT, True, True)
    yield Case("heads_grad_cast", "not rotated", merged)


_GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (_operands, _norms, _heads, _activations, _rotary)


def cases() -> list[Case]:
    """All cases; every operation has one."""
    return [case for group in _GROUPS for case in group()]
