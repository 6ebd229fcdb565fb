"""Norms and non-linearities whose backward keeps their input in FP8.

Backward of RMSNorm, LayerNorm, SwiGLU and GELU needs the input, in BF16 two bytes an element: once the
operands of GEMMs are FP8, that is most of what a block keeps. Here it is E4M3 codes with an E8M0 scale for
each 16 elements of a row: 17 bytes for 16 (COAT, Xi et al. 2024, arXiv 2410.19313, section 5, whose groups
are 1x16 as well, with BF16 scales). Groups lie along the features: an outlier costs its 15 neighbours, not
other tokens.

Forward reads the exact input, so the loss is not touched. Backward decodes the codes, evaluates the function
there again, and differentiates it: the exact gradient of a point about 2.6 % (RMS) away, statistics of the
norm included. That costs the function's forward once more, as recomputation does; but recomputation of a
single function would have to keep its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fp8train.numerics.block_scales import as_blocks, dequantize_blocks, from_blocks, quantize_blocks
from fp8train.precision.number_formats import E4M3
from fp8train.precision.scale_blocks import SAVED_BLOCK


class _FromCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        codes, scales = quantize_blocks(as_blocks(x, SAVED_BLOCK), E4M3)
        ctx.save_for_backward(codes, scales, *parameters)
        ctx.function, ctx.shape, ctx.dtype = function, x.shape, x.dtype
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, *parameters = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        x = from_blocks(dequantize_blocks(codes, scales, wide), ctx.shape).to(ctx.dtype)
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(needed[0])
            y = ctx.function(leaf)
        wanted = [tensor for tensor, need in zip((leaf, *parameters), needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grads[0]))
        return None, *(next(found) if need else None for need in needed)


def from_fp8_input(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, whose backward keeps FP8 codes of ``x`` and nothing else.

    Args:
        function: elementwise, or of rows; its parameters, if it is a module, get their gradients.
        x: [.., K], BF16, FP32 or FP64.

    Returns:
        What ``function`` returns. Where x is not finite, the gradient of its group is NaN.
    """
    if not torch.is_grad_enabled():
        return function(x)
    parameters = tuple(function.parameters()) if isinstance(function, nn.Module) else ()
    return _FromCodes.apply(function, x, *parameters)
