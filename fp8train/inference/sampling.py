"""Choosing the next token from logits: temperature, top-k, top-p.

The filters apply in the usual order: divide by the temperature, keep the k likeliest tokens, of these keep
the smallest set of likeliest tokens whose mass reaches p (nucleus sampling, Holtzman et al. 2020),
renormalise. Everything runs in FP64 on the CPU with a CPU generator, so a seed gives the same choices on
every device (as far as the logits agree); one row per token makes the cost invisible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.inference.errors import InferenceError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its distribution.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: tokens kept; None keeps all.
        top_p: mass kept, at least the likeliest token; None keeps all.

    Raises:
        InferenceError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InferenceError(f"temperature {self.temperature} must be finite and not negative")
        if self.top_k is not None and self.top_k < 1:
            raise InferenceError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise InferenceError(f"top_p {self.top_p} must lie between 0 and 1")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from.

    Args:
        logits: [B, V], any float dtype and device.
        sampling: the filters.

    Returns:
        FP64 [B, V] on the CPU; rows sum to 1. Temperature 0 puts everything on the first largest logit.
    """
    scores = logits.detach().double().cpu()
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    scores = scores - scores.amax(dim=-1, keepdim=True)  # first, so that a tiny temperature cannot overflow
    ordered, order = (scores / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = -torch.inf
    kept = ordered.softmax(dim=-1)
    if sampling.top_p is not None:
        mass_before = kept.cumsum(dim=-1) - kept
        drop = mass_before >= sampling.top_p
        drop[:, 0] = False
        kept = kept.masked_fill(drop, 0.0)
        kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.empty_like(kept).scatter_(-1, order, kept)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token for each row of logits.

    Args:
        logits: [B, V].
        sampling: how to choose.
        generator: CPU generator; temperature 0 does not touch it.

    Returns:
        int64 [B] on the CPU.
    """
    chances = probabilities(logits, sampling)
    if sampling.temperature == 0:
        return chances.argmax(dim=-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
