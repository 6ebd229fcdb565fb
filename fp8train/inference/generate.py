"""Continuing text: ``fp8train generate``.

The prompt runs through the model once and fills a key/value cache; every further token costs one forward of
one position. All samples go as one batch. A sample that has ended is carried along until the last one ends.

**What a token's logits depend on.** In BF16: on the tokens before it in its own sequence. With FP8 GEMMs
that holds where scales are fixed before the text is seen: delayed ones (inference reads the checkpoint's
scales and moves none) and constant ones. A *current* scale is the amax of whatever matrix is multiplied: of
all positions of the prompt in the first forward, of one token of every sample in each later one. So logits
then differ between cached and uncached forward, between other cuts of the prompt, and with what else is in
the batch, samples that have ended included: as training depends on its micro-batch. By how much is the
scale's affair: one that is free moves every rounding (some 1e-2 of the logits' spread), a power of two moves
by whole binades and so only the roundings of elements that are subnormal, 2^-14 of the amax (some 1e-5;
tests/inference/test_numerics.py). One token of one sample is a matrix too: its scale is its own amax, and
GEMMs pad it with zeros to the 16 rows of an FP8 tensor core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fp8train.comm.processes import choose_device
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import open_run
from fp8train.inference.sampling import Sampling, sample
from fp8train.inference.weights import Numerics
from fp8train.layers.head_gemms import head_gemms
from fp8train.layers.linear_plan import Alphas
from fp8train.models.decoder import Decoder


@torch.no_grad()
def generate(
    model: Decoder,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    eod_id: int | None,
    num_samples: int = 1,
    vocab_size: int | None = None,
    stop: Callable[[list[int]], bool] = lambda new_tokens: False,
) -> list[list[int]]:
    """Continue ``prompt_tokens`` by up to ``max_tokens`` tokens, once or several times.

    Args:
        model: with its weights.
        prompt_tokens: at least one token id.
        max_tokens: most tokens to add.
        sampling: how each is chosen.
        generator: CPU generator.
        eod_id: a sample ends when this is drawn (it is not returned); None never ends early.
        num_samples: continuations to draw.
        vocab_size: ids from here on are never drawn (a tokenizer may have fewer than the model); default: the
            model's vocabulary.
        stop: a sample also ends, its last token kept, once this is true of its new tokens.

    Returns:
        ``num_samples`` lists of new tokens.

    Raises:
        InferenceError: no prompt, more tokens than the model has positions, or logits that are not finite.
    """
    _check_length(len(prompt_tokens), max_tokens, model.config.max_seq_len)
    choices = min(vocab_size or model.vocab_size, model.vocab_size)
    device, alpha = model.embedding.weight.device, model.parametrization.head().output
    for linear in model.linears().values():
        linear.decode_weight()
    if model.fp8_head is not None and not model.head_weight.requires_grad:
        model.fp8_head.decode(model.head_weight)
    alphas = Alphas(output=alpha)
    head = head_gemms(
        model.head_weight,
        model.fp8_head,
        rows=num_samples,
        alphas=alphas,
        needs_grad=False,
        choices=choices,
    )
    caches = model.make_caches(num_samples, len(prompt_tokens) + max_tokens - 1)
    tokens = torch.tensor([list(prompt_tokens)] * num_samples, dtype=torch.int64)
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    running = set(range(num_samples))
    for _ in range(max_tokens):
        last = model.hidden(tokens.to(device), caches)[:, -1]
        scores = head.logits(head.take(last))
        if not scores.isfinite().all():
            raise InferenceError(
                "the model's logits are not finite; take a checkpoint from before it diverged"
            )
        drawn = sample(scores, sampling, generator)
        for i, token in enumerate(drawn.tolist()):
            if i in running and token == eod_id:
                running.remove(i)
            elif i in running:
                samples[i].append(token)
                if stop(samples[i]):
                    running.remove(i)
        if not running:
            break
        tokens = drawn[:, None]
    return samples


def _check_length(prompt: int, max_tokens: int, context: int) -> None:
    if prompt == 0:
        raise InferenceError("the prompt has no tokens; start with the end-of-document token for free text")
    if prompt > context:
        raise InferenceError(
            f"the prompt has {prompt} tokens, the model's context (`max_seq_len`) is {context}; "
            "shorten the prompt"
        )
    # The last token is drawn but never fed back.
    if prompt + max_tokens - 1 > context:
        raise InferenceError(
            f"{prompt} tokens of prompt and {max_tokens} new ones do not fit the model's context "
            f"(`max_seq_len`: {context}); use --max-tokens {context - prompt + 1} or a shorter prompt"
        )


def generate_command(
    checkpoint: Path,
    *,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    num_samples: int,
    device: str,
    numerics: Numerics,
) -> int:
    """Print continuations of ``prompt`` to stdout, what was loaded to stderr.

    Args:
        checkpoint: step directory, or run directory for its newest good checkpoint.
        prompt: text to continue; empty: the model begins a document.
        max_tokens: most tokens to add.
        sampling: how each is chosen.
        seed: of the sampling.
        num_samples: continuations to print.
        device: ``auto``, ``cpu`` or ``cuda``.
        numerics: see :mod:`fp8train.inference.weights`.

    Returns:
        Exit status 0.

    Raises:
        UserError: anything that :func:`~fp8train.inference.load.open_run`, its results or :func:`generate`
            refuse.
    """
    chosen, run = choose_device(device, 0), open_run(checkpoint)
    tokenizer = run.tokenizer()
    built = run.load(numerics, device=chosen)
    print(f"{run.path}: step {run.step}, {run.describe(numerics, built)}", file=sys.stderr, flush=True)
    prompt_tokens = tokenizer.encode(prompt) or [tokenizer.eod_id]
    samples = generate(
        built.model,
        prompt_tokens,
        max_tokens=max_tokens,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
        eod_id=tokenizer.eod_id,
        num_samples=num_samples,
        vocab_size=tokenizer.vocab_size,
    )
    for number, new_tokens in enumerate(samples, start=1):
        if num_samples > 1:
            print(f"--- sample {number} of {num_samples}")
        print(tokenizer.decode([*prompt_tokens, *new_tokens]))
    return 0
