"""Smooth-SwiGLU: keep rare huge values of SwiGLU out of the scale that everyone shares.

Over long FP8 training the gate and up rows of some channels align, so that their product grows with the
square of the input: a few values are hundreds of times the rest, and one scale per tensor leaves little
precision for the rest (Fishman et al. 2024, arXiv 2409.12517). Two variants leave the function unchanged and
narrow the range of the operand. Both factors are powers of two, so multiplying by them is exact (overflow of
the exponent apart), and constants to the backward pass, as scales are.

* ``token``, of the authors' published code: a token's activation is divided by ``s`` before the down
  projection casts it, the projection's output is multiplied by ``s``. ``s`` is the largest magnitude of the
  token's up half. With scales per row or block of the operand itself it is not needed.
* ``channel``, of their paper: channel k of the activation is divided by ``s[k]``, the largest magnitude that
  the channel has in this micro-batch, and column k of the down projection's weight is multiplied by it. The
  weight is therefore cast anew for every micro-batch, and a channel that is large burdens the weight's scale
  instead of the activation's.
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
    return _largest_power(amax)


def channel_scale(activated: Tensor, parallel: TensorParallel | None) -> Tensor:
    """``2^floor(log2(max |activated|))`` of every channel, 1 where that is 0 or not finite.

    Args:
        activated: [B, S, F], all of this rank's tokens and this rank's channels.
        parallel: tells which ranks have other tokens of the same sequences; None if none.

    Returns:
        FP32 [F], the same on ranks with the same channels.
    """
    amax = activated.detach().abs().amax(dim=(0, 1)).float()
    others = None if parallel is None else parallel.agreement(tp=False, cp=True)
    return _largest_power(amax if others is None else others.largest(amax))


def _largest_power(amax: Tensor) -> Tensor:
    power = (amax.view(torch.int32) & _EXPONENT).view(torch.float32)  # the mantissa cleared
    return torch.where((power > 0) & torch.isfinite(amax), power, torch.ones_like(power))
