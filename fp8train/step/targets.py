"""Samples as model inputs and the tokens to predict."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.layers.loss import IGNORE


def inputs_and_targets(tokens: Tensor, ignore_after: int | None) -> tuple[Tensor, Tensor]:
    """Cut samples into model inputs and next-token targets.

    Args:
        tokens: int64 [.., S+1]; a complemented (negative) token is read, but is no target
            (:mod:`fp8train.data.packing`).
        ignore_after: an end-of-document id whose following prediction is left out of the loss; None keeps
            all.

    Returns:
        (inputs, targets), each [.., S]; left-out targets are -100.
    """
    is_target = tokens >= 0
    inputs = torch.where(is_target, tokens, ~tokens)[..., :-1]
    targets = torch.where(is_target, tokens, IGNORE)[..., 1:]
    if ignore_after is not None:
        targets = torch.where(inputs == ignore_after, IGNORE, targets)
    return inputs.contiguous(), targets.contiguous()
