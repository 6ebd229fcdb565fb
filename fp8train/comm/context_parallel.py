"""Context parallelism: every rank holds a part of each sequence, attention sees all of it.

Before attention an all-to-all trades tokens for heads: a rank gives away its tokens of other ranks' heads and
gets all tokens of its own. After attention the reverse. Each way moves ``(N-1)/N`` of the queries, keys,
values or outputs, and the arithmetic is that of one process, for any causal or full attention (Jacobs et al.
2023, DeepSpeed-Ulysses). The number of key/value heads must be a multiple of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup

_Way = Callable[[Tensor, CountedGroup], Tensor]


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that hold parts of the same sequences.

    Attributes:
        group: in the order of the parts.
    """

    group: CountedGroup

    @property
    def size(self) -> int:
        """Number of ranks N that hold parts of each sequence."""
        return self.group.size

    @property
    def rank(self) -> int:
        """This process's place among them, 0 to N - 1."""
        return self.group.rank

    def part(self, tokens: Tensor) -> Tensor:
        """This rank's part of sequences: [.., S] -> [.., S/N]."""
        return tokens.chunk(self.size, dim=-1)[self.rank].contiguous()

    def offset(self, length: int) -> int:
        """Position of the first token, when each part has ``length``."""
        return self.rank * length

    def to_heads(self, x: Tensor) -> Tensor:
        """All tokens of this rank's heads: [B, heads, S/N, D] -> [B, heads/N, S, D]."""
        return _Trade.apply(x, self.group, _to_heads, _to_tokens)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All heads of this rank's tokens: [B, heads/N, S, D] -> [B, heads, S/N, D]."""
        return _Trade.apply(x, self.group, _to_tokens, _to_heads)


def _trade(parts: Tensor, group: CountedGroup) -> Tensor:
    """Give part r to rank r, get one from each: [N, ..] of any dtype."""
    sent = parts.reshape(group.size, -1)
    received = torch.empty_like(sent)
    group.all_to_all(received.view(torch.uint8), sent.view(torch.uint8), purpose="cp_attention")()
    return received.view(parts.shape)


def _to_heads(x: Tensor, group: CountedGroup) -> Tensor:
    batch, heads, length, dim = x.shape
    parts = x.reshape(batch, group.size, heads // group.size, length, dim).transpose(0, 1).contiguous()
    received = _trade(parts, group)  # [source, B, h, S/N, D]
    return received.permute(1, 2, 0, 3, 4).reshape(batch, heads // group.size, -1, dim)


def _to_tokens(x: Tensor, group: CountedGroup) -> Tensor:
    batch, heads, length, dim = x.shape
    parts = x.reshape(batch, heads, group.size, length // group.size, dim).permute(2, 0, 1, 3, 4)
    received = _trade(parts.contiguous(), group)
    return received.transpose(0, 1).reshape(batch, heads * group.size, -1, dim)


class _Trade(torch.autograd.Function):
    """One way in forward, and ``back`` for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: CountedGroup, there: _Way, back: _Way) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.group), None, None, None
