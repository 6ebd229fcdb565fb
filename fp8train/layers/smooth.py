"""Smooth-SwiGLU: keep rare huge values of SwiGLU out of the scale that everyone shares.

Over long FP8 training the gate and up rows of some channels align, so that their product grows with the
square of the input: a few values are hundreds of times the rest, and one scale per tensor leaves little
precision for the rest (Fishman et al. 2024, arXiv 2409.12517). Per token, the activation is divided by ``s``
before the down projection casts it, and the projection's output is multiplied by ``s``: the function is
unchanged, the operand's range is that of one token. ``s`` is the largest magnitude of the token's up half,
rounded down to a power of two, so both multiplications are exact (overflow of the exponent apart); it is a
constant to the backward pass, as scales are.

This is the variant of the authors' published code; with scales per row or block of the operand itself it is
not needed. (The variant of their paper, a factor per channel that the next weight absorbs, would have to be
undone inside the weight's own cast.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.sequence_parallel import TensorParallel

_EXPONENT = 0x7F800000


def token_scale(up: Tensor, parallel: TensorParallel | None) -> Tensor:
    """``2^floor(log2(max |up|))`` of every token, 1 where that is 0 or not finite.

    Args:
        up: [B, S, F], this rank's columns.
        parallel: ranks with the other columns; None if there are none.

    Returns:
        FP32 [B, S, 1], the same on all ranks.
    """
    amax = up.detach().abs().amax(dim=-1, keepdim=True).float()
    if parallel is not None and parallel.size > 1:
        amax = amax.nan_to_num(nan=torch.inf, posinf=torch.inf)
        parallel.group.all_reduce(amax, purpose="amax", op=dist.ReduceOp.MAX)()
    power = (amax.view(torch.int32) & _EXPONENT).view(torch.float32)  # the mantissa cleared
    return torch.where((power > 0) & torch.isfinite(amax), power, torch.ones_like(power))
