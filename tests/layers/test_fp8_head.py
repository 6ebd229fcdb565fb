"""The FP8 head against products of its own codes in FP64, cast here by torch from scales found here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.kernels.gemm_choice import GemmBackend
from fp8train.layers.fp8_head import Fp8Head
from fp8train.layers.linear_plan import Alphas
from fp8train.layers.log_probs import token_log_probs
from fp8train.layers.loss import IGNORE, linear_cross_entropy, logits
from fp8train.layers.wire import wire

DECODE = GemmBackend("decode", "test")
ALPHAS = Alphas(output=0.5, grad_input=2.0, grad_weight=0.25)


def inputs(
    tokens: int, rows: int, vocab_size: int, dtype: torch.dtype, width: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden [tokens, width], weight [rows, width] and targets, a fifth of them ignored."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = 0.3 * torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.2] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def rounded(x: Tensor, dtype: torch.dtype, exponent: int) -> Tensor:
    """What is left of ``x`` in an FP8 format at this scale: FP64. torch rounds FP32 to nearest, ties to
    even."""
    return (x.detach().float() * 2.0**exponent).to(dtype).double() * 2.0**-exponent


def in_e4m3(x: Tensor) -> Tensor:
    """With the largest power of two that keeps the largest magnitude at most 448."""
    return rounded(x, torch.float8_e4m3fn, math.floor(math.log2(448 / float(x.detach().abs().max()))))


def truth(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, alphas: Alphas
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_hidden, grad_weight, logits) with every product formed of dequantised operands in FP64."""
    x, w = in_e4m3(hidden), in_e4m3(weight)
    scores = alphas.output * x @ w.t()
    counts = targets != IGNORE
    real = scores[:, :vocab_size]
    log_probs = real.log_softmax(1)
    loss = -log_probs[counts].gather(1, targets[counts, None]).sum()
    gradient = torch.zeros_like(scores)
    gradient[:, :vocab_size] = log_probs.exp()
    gradient[counts, targets[counts]] -= 1
    gradient = rounded(gradient * counts[:, None], torch.float8_e5m2, 15)
    return loss, alphas.grad_input * gradient @ w, alphas.grad_weight * gradient.t() @ x, real


@pytest.mark.parametrize(
    ("tokens", "rows", "vocab_size"),
    [
        pytest.param(33, 48, 48, id="whole"),
        pytest.param(33, 48, 41, id="padded vocabulary"),
        pytest.param(1, 37, 35, id="no multiple of 16"),
        pytest.param(300, 16400, 16390, id="three chunks, the last one partial"),
    ],
)
@pytest.mark.parametrize("alphas", [Alphas(), ALPHAS], ids=["standard", "multipliers"])
def test_products_are_those_of_the_codes(tokens: int, rows: int, vocab_size: int, alphas: Alphas) -> None:
    hidden, weight, targets = inputs(tokens, rows, vocab_size, torch.float64)
    targets[0] = 3
    head = Fp8Head(DECODE)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, alphas=alphas, fp8=head)
    grads = torch.autograd.grad(loss / 3, (hidden, weight))
    expected = truth(hidden, weight, targets, vocab_size, alphas)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-12, atol=0)
    for ours, theirs in zip(grads, expected[1:3], strict=True):
        torch.testing.assert_close(3 * ours, theirs, rtol=1e-10, atol=1e-13)
    with pytest.raises(RuntimeError, match="no gradient"):
        logits(hidden, weight, vocab_size=vocab_size, fp8=head)
    with torch.no_grad():
        found = logits(hidden, weight, vocab_size=vocab_size, alpha=alphas.output, fp8=head)
    torch.testing.assert_close(found, expected[3], rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("each_cpu")
def test_a_bf16_model_rounds_nothing_more_than_its_gradients() -> None:
    """Logits are FP32 sums, the gradient is cast from FP32. A gradient next to a boundary of E5M2 may be cast
    to the other side of it; the result is rounded to BF16."""
    hidden, weight, targets = inputs(300, 128, 120, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=120, fp8=Fp8Head(DECODE))
    grads = torch.autograd.grad(loss, (hidden, weight))
    expected = truth(hidden, weight, targets, 120, Alphas())
    assert abs(loss.item() - float(expected[0])) < 1e-6 * float(expected[0])
    for ours, theirs in zip(grads, expected[1:3], strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 2**-8


def test_scoring_and_evaluation_see_the_same_head() -> None:
    hidden, weight, targets = inputs(40, 64, 60, torch.float64)
    targets = targets.clamp(min=0)
    head = Fp8Head(DECODE)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, vocab_size=60, fp8=head)
        nats, greedy = token_log_probs(hidden, weight, targets, vocab_size=60, fp8=head)
        scores = logits(hidden, weight, vocab_size=60, fp8=head)
    torch.testing.assert_close(-nats.sum(), loss, rtol=1e-12, atol=0)
    assert torch.equal(greedy, scores.argmax(1) == targets)
    trained = linear_cross_entropy(hidden, weight, targets, vocab_size=60, fp8=head)
    assert trained.item() == loss.item()


def test_the_weight_is_cast_when_it_changes() -> None:
    hidden, weight, targets = inputs(16, 32, 32, torch.float32)
    head = Fp8Head(DECODE)
    linear_cross_entropy(hidden, weight, targets, vocab_size=32, fp8=head)
    codes = head.weight(weight).rows[0]
    linear_cross_entropy(hidden, weight, targets, vocab_size=32, fp8=head)
    assert head.weight(weight).rows[0] is codes
    assert head.nbytes == 32 * 32 + 4  # 24 columns are padded to 32
    with torch.no_grad():
        weight.mul_(2)
    assert head.weight(weight).rows[0] is not codes
    assert float(head.weight(weight).rows[1]) == 2 * float(Fp8Head(DECODE).weight(weight / 2).rows[1])


def test_what_is_not_finite_is_not_hidden() -> None:
    hidden, weight, targets = inputs(16, 32, 32, torch.float32)
    with torch.no_grad():
        hidden[3, 1] = torch.nan
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=32, fp8=Fp8Head(DECODE))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert not loss.isfinite()
    assert not any(grad.isfinite().all() for grad in grads)


def of_a_rank(group: dist.ProcessGroup, rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs in the pool: the loss, and the gradients of this rank's part of the sequence and its rows."""
    ours, alone = CountedGroup(group), CountedGroup(None)
    parallel = TensorParallel(ours, shards=ours, context=alone)
    hidden, weight, targets = inputs(40, 64, 60, torch.float64)
    part = hidden.detach().chunk(world_size)[rank].clone().unsqueeze(0).requires_grad_()
    rows = weight.detach().chunk(world_size)[rank].clone().requires_grad_()
    head = Fp8Head(DECODE, wire("column", parallel))
    loss = linear_cross_entropy(part, rows, targets.unsqueeze(0), vocab_size=60, parallel=parallel, fp8=head)
    return (loss.detach(), *torch.autograd.grad(loss, (part, rows)))


def test_a_vocabulary_that_is_cut_has_the_same_codes(gloo_pool: Any) -> None:
    expected = truth(*inputs(40, 64, 60, torch.float64), 60, Alphas())
    found = gloo_pool.run(of_a_rank, 2)
    for loss, _, _ in found:
        torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    grad_hidden = torch.cat([grad[0] for _, grad, _ in found])
    grad_weight = torch.cat([grad for _, _, grad in found])
    for ours, theirs in ((grad_hidden, expected[1]), (grad_weight, expected[2])):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
