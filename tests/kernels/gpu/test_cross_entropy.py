"""The launchers of cross-entropy against FP64 and against their references.

Exponentials and sums in another order differ by units in the last place, so results are compared with a
tolerance of a few of them, and rounded gradients with one of BF16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels import cross_entropy as ops
from tests.kernels.gpu.same import same

SHAPES = [(3, 64, 64), (5, 80, 71), (2, 4128, 4100), (4, 16, 1), (0, 32, 32)]
"""(tokens, columns, real ones)."""


def inputs(tokens: int, width: int, real: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, V], columns [T, 1] and weights [T, 1], one of which is 0."""
    generator = torch.Generator().manual_seed(width)
    logits = (4 * torch.randn(tokens, width, generator=generator)).to(dtype)
    column = torch.randint(real, (tokens, 1), generator=generator)
    weight = torch.ones(tokens, 1)
    weight[1::3] = 0
    return logits, column, weight


@pytest.mark.parametrize("alpha", [1.0, 0.375])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "width", "real"), SHAPES)
def test_loss_and_gradient(tokens: int, width: int, real: int, dtype: torch.dtype, alpha: float) -> None:
    logits, column, weight = inputs(tokens, width, real, dtype)
    arguments = logits, column, real, alpha
    launched = ops._statistics_op.launch(*arguments)
    reference = ops.softmax_statistics(logits, column, real=real, alpha=alpha)
    for ours, theirs, fake in zip(launched, reference, ops._softmax_statistics_fake(*arguments), strict=True):
        assert ours.shape == theirs.shape == fake.shape and ours.dtype == theirs.dtype == fake.dtype
    assert same(launched[0], reference[0])
    assert same(launched[2], reference[2])
    largest, total, score = launched

    exact = (logits[:, :real].double() * alpha).requires_grad_()
    losses = F.cross_entropy(exact, column[:, 0], reduction="none")
    (expected,) = torch.autograd.grad((losses * weight[:, 0]).sum(), exact)
    torch.testing.assert_close((total.log() - (score - largest))[:, 0].double(), losses, rtol=1e-6, atol=1e-6)

    for out, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        args = logits, largest, total, column, weight, weight, real, alpha, out
        gradient = ops._gradient_op.launch(*args)
        fake = ops._softmax_gradient_fake(*args)
        assert gradient.shape == fake.shape and gradient.dtype == fake.dtype == out
        torch.testing.assert_close(gradient[:, :real].double(), expected, rtol=tolerance, atol=1e-7)
        assert not gradient[:, real:].any()
        assert not gradient[1::3].any()
        torch.testing.assert_close(gradient, ops._softmax_gradient(*args), rtol=tolerance, atol=1e-7)


def test_parts_of_a_vocabulary_add_up_to_the_whole() -> None:
    logits, column, weight = inputs(6, 96, 96, torch.float32)
    largest, total, score = ops._statistics_op.launch(logits, column, 96, 1.0)
    whole = ops._gradient_op.launch(logits, largest, total, column, weight, weight, 96, 1.0, torch.float32)
    sums, gradients = [], []
    for first in range(0, 96, 32):
        part, own = logits[:, first : first + 32].contiguous(), column - first
        here = ((own >= 0) & (own < 32)).float() * weight
        own = own.masked_fill(here == 0, 0)
        own_largest, own_total, own_score = ops._statistics_op.launch(part, own, 32, 1.0)
        assert same(own_score[here == 1], score[here == 1])
        sums.append(own_total * (own_largest - largest).exp())
        args = part, largest, total, own, weight, here, 32, 1.0, torch.float32
        gradients.append(ops._gradient_op.launch(*args))
    torch.testing.assert_close(sum(sums), total, rtol=1e-6, atol=0)
    assert same(torch.cat(gradients, 1), whole)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite(value: float) -> None:
    logits, column, weight = inputs(3, 32, 30, torch.float32)
    logits[1, 7] = value
    logits[2, :30] = -torch.inf
    weight[:] = 1
    for statistics, gradient in (
        (ops._statistics_op.launch, ops._gradient_op.launch),
        (ops._softmax_statistics, ops._softmax_gradient),
    ):
        largest, total, score = statistics(logits, column, 30, 1.0)
        loss = total.log() - (score - largest)
        assert loss[:, 0].isnan().tolist() == [False, True, True]
        args = largest, total, column, weight, weight, 30, 1.0, torch.bfloat16
        assert gradient(logits, *args).isnan().all(dim=1).tolist() == [False, True, True]


def test_far_apart_logits() -> None:
    """Larger logits late in a row, on top of a sum that has begun; and logits that no exponential reaches."""
    logits = torch.full((2, 9000), -1e30)
    logits[0, 17], logits[0, 8999] = 50.0, 300.0
    logits[1, 8000] = -2e4
    column = torch.tensor([[17], [8000]])
    largest, total, score = ops._statistics_op.launch(logits, column, 9000, 1.0)
    assert (total.log() - (score - largest))[:, 0].tolist() == [250.0, 0.0]


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32], ids=str)
def test_a_factor_is_not_rounded(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.randn(70, 63, generator=torch.Generator().manual_seed(0)).to(source)
    factor = torch.tensor(1 / 2500)
    expected = (x.double() * factor.double()).float().to(target)
    for call in (ops._times_op.launch, ops.times_factor):
        assert same(call(x, factor, target), expected)


def test_without_memory() -> None:
    logits = torch.empty(4, 32, device="meta")
    column, one = torch.empty(4, 1, dtype=torch.int64, device="meta"), torch.empty(4, 1, device="meta")
    largest, total, _ = ops.softmax_statistics(logits, column, real=30)
    gradient = ops.softmax_gradient(
        logits, largest, total, column, weight=one, here=one, real=30, dtype=torch.bfloat16
    )
    assert gradient.shape == (4, 32) and gradient.dtype == torch.bfloat16
    assert ops.times_factor(gradient, one[0, 0], torch.float32).dtype == torch.float32
