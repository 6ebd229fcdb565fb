"""Log-probabilities of given tokens, a chunk of positions at a time: what scoring reads instead of a loss.

The sum of :func:`fp8train.layers.loss.linear_cross_entropy` cannot be taken apart again; a choice of an
answer needs every token's share, and whether the model would have taken it greedily. Softmax runs in FP32
(FP64 in FP64 models), as in the loss. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8train.layers.fp8_head import Fp8Head
from fp8train.layers.head_gemms import head_gemms
from fp8train.layers.linear_plan import Alphas

_CHUNK_BYTES = 64 << 20


@torch.no_grad()
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    alpha: float = 1.0,
    fp8: Fp8Head | None = None,
) -> tuple[Tensor, Tensor]:
    """``log softmax(alpha · hidden @ weight.T)[target]`` of every position.

    Args:
        hidden: [T, H].
        weight: [V, H], V >= vocab_size; rows from ``vocab_size`` on are padding.
        targets: int64 [T].
        vocab_size: real vocabulary.
        alpha: multiplier of the logits.
        fp8: as for the loss.

    Returns:
        (nats, FP32 (FP64 for FP64 inputs) [T]; whether the target is the likeliest token, bool [T]).
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = max(1, min(len(targets), _CHUNK_BYTES // (vocab_size * wide.itemsize)))
    alphas = Alphas(output=alpha)
    gemms = head_gemms(weight, fp8, rows=rows, alphas=alphas, needs_grad=False, choices=vocab_size)
    operand = gemms.take(hidden)
    log_probs = torch.empty(len(targets), dtype=wide, device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        scores = gemms.logits(operand[part]).to(wide)
        target = targets[part, None]
        log_probs[part] = (scores.gather(1, target) - scores.logsumexp(dim=-1, keepdim=True))[:, 0]
        greedy[part] = scores.argmax(dim=-1) == target[:, 0]
    return log_probs, greedy
