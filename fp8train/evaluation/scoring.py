"""How likely a model finds given tokens after others: what perplexity of a text and every task rest on.

A :class:`Request` is a context and a target; its score is the sum of the target tokens' log-probabilities.
Requests run in batches, padded on the right with the end-of-document id: attention is causal, so no token
sees the padding behind it. With *current* FP8 scales it still counts, because an activation's scale is that
of the whole batch: there a score depends on what it was batched with, as training depends on its micro-batch.

So batches are made before ranks are looked at (requests by falling length, equal ones in order), and ranks
take whole batches in turn. Every rank then multiplies the matrices that one process would: scores are the
same bits for any number of ranks, at equal threads, whatever the scales. The price: up to one batch of idle
time per rank at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.data.tokenizer import Tokenizer
from fp8train.inference.errors import InferenceError
from fp8train.layers.log_probs import token_log_probs
from fp8train.models.decoder import Decoder


@dataclass(frozen=True)
class Request:
    """Tokens to score, and the tokens that they follow.

    Attributes:
        context: token ids before the target, at least one.
        target: token ids to predict, at least one.
    """

    context: Sequence[int]
    target: Sequence[int]

    def fitted(self, context_length: int) -> Request:
        """The same with a context that leaves room for the target: its first tokens are dropped.

        Raises:
            InferenceError: the target alone is longer than the model's context.
        """
        room = context_length + 1 - len(self.target)  # the last token is predicted, not read
        if room < 1:
            raise InferenceError(
                f"{len(self.target)} tokens to score do not fit a context of {context_length} tokens"
            )
        return self if len(self.context) <= room else Request(self.context[-room:], self.target)


@dataclass(frozen=True)
class Score:
    """How likely the model finds the target of one request.

    Attributes:
        log_prob: summed over the target, in nats.
        greedy: whether every target token is the likeliest one.
    """

    log_prob: float
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, *, apart: bool = False) -> Request:
    """Tokens of a context and what follows it, cut where lm-eval cuts.

    White space at the end of the context moves to the continuation, because most tokenizers begin a word with
    its space. The whole text is tokenised, then the context alone; the target is what the whole has more.
    Where a token would span the boundary, so that the whole has no more tokens, it is the whole's last token.
    An empty context becomes the end-of-document id, after which documents begin.

    ``apart`` tokenises both by themselves instead, and moves nothing: the tokens that a fine-tuned model has
    seen (:mod:`fp8train.data.conversations`), which never had to predict the end of a prompt.

    Raises:
        InferenceError: there is nothing to score.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(continuation if apart else context + continuation)
    if not whole:
        raise InferenceError("no tokens to score")
    if apart:
        return Request(tokenizer.encode(context) or [tokenizer.eod_id], whole)
    before = len(tokenizer.encode(stripped)) if stripped else 0
    cut = min(before, len(whole) - 1)
    return Request(whole[:cut] or [tokenizer.eod_id], whole[cut:])


@torch.no_grad()
def score(
    model: Decoder,
    requests: Sequence[Request],
    *,
    batch_size: int,
    pad_id: int,
    ranks: CountedGroup,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Score]:
    """Score requests, each of which fits the model's context; collective over ``ranks``.

    Args:
        model: with its weights, the same on every rank.
        requests: the same on every rank.
        batch_size: requests per forward.
        pad_id: a legal token that fills short rows.
        ranks: processes to share the work with.
        advance: called after every batch of this rank with the tokens it read.

    Returns:
        All scores in the order of ``requests``, on every rank.

    Raises:
        InferenceError: a score is not finite, because the model has diverged.
    """
    device = model.embedding.weight.device
    order = sorted(range(len(requests)), key=lambda i: -_read(requests[i]))  # sorted() is stable
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = torch.zeros(len(requests), 2, dtype=torch.float64)
    for batch in batches[ranks.rank :: ranks.size]:
        chosen = [requests[i] for i in batch]
        found[batch] = _score_batch(model, chosen, pad_id, device)
        advance(sum(map(_read, chosen)))
    on_device = found.to(device)
    ranks.all_reduce(on_device, purpose="scores")()  # every row is zero but on one rank, so the sum is exact
    rows = on_device.tolist()
    if not bool(on_device.isfinite().all()):
        raise InferenceError("the model's logits are not finite; take a checkpoint from before it diverged")
    return [Score(log_prob, bool(greedy)) for log_prob, greedy in rows]


def _read(request: Request) -> int:
    """Tokens that the model reads."""
    return len(request.context) + len(request.target) - 1


def _score_batch(model: Decoder, requests: Sequence[Request], pad_id: int, device: torch.device) -> Tensor:
    """FP64 [B, 2] on the CPU: summed log-probability, and 1 where all targets are the likeliest."""
    length = max(map(_read, requests))
    tokens = torch.full((len(requests), length), pad_id, dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, request in enumerate(requests):
        sequence = [*request.context, *request.target]
        tokens[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        rows += [row] * len(request.target)
        columns += range(len(request.context) - 1, len(sequence) - 1)
        targets += request.target
    hidden = model.hidden(tokens.to(device))
    index, target = torch.tensor([rows, columns], device=device), torch.tensor(targets, device=device)
    log_probs, greedy = token_log_probs(
        hidden[index[0], index[1]],
        model.head_weight,
        target,
        vocab_size=model.vocab_size,
        alpha=model.parametrization.head().output,
        fp8=model.fp8_head,
    )
    # Summed on the CPU: index_add on a GPU adds in an order of its own.
    owner, zeros = torch.tensor(rows), torch.zeros(len(requests), dtype=torch.float64)
    sums = zeros.index_add(0, owner, log_probs.double().cpu())
    misses = zeros.index_add(0, owner, (~greedy).double().cpu())
    return torch.stack([sums, (misses == 0).double()], dim=1)
