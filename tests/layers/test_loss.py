"""The fused loss against ``F.cross_entropy`` of the whole logits in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.sequence_parallel import TensorParallel
from fp8train.layers.head_gemms import HeadGemms
from fp8train.layers.linear_plan import Alphas
from fp8train.layers.loss import (
    IGNORE,
    _fused_softmax,
    _softmax,
    _Targets,
    _Vocabulary,
    linear_cross_entropy,
    logits,
)

HIDDEN = 8


def inputs(tokens: int, rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden [tokens, 8], weight [rows, 8] and targets, a fifth of them ignored."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.2] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, factor: float
) -> list[Tensor]:
    """(loss, grad_hidden, grad_weight) of ``factor`` times the summed loss, in FP64."""
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight[:vocab_size].t(), targets, reduction="sum", ignore_index=IGNORE)
    return [loss.detach(), *torch.autograd.grad(loss * factor, (hidden, weight))]


@pytest.mark.parametrize(
    ("tokens", "rows", "vocab_size"),
    [
        pytest.param(33, 48, 48, id="whole"),
        pytest.param(33, 48, 41, id="padded vocabulary"),
        pytest.param(2500, 4096, 4001, id="three chunks, the last one partial"),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 1 / 3000])
def test_equals_cross_entropy(tokens: int, rows: int, vocab_size: int, factor: float) -> None:
    hidden, weight, targets = inputs(tokens, rows, vocab_size, torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size)
    grads = torch.autograd.grad(loss * factor, (hidden, weight))
    expected = reference(hidden, weight, targets, vocab_size, factor)
    for ours, theirs in zip((loss.detach(), *grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)
    assert grads[1][vocab_size:].count_nonzero() == 0
    assert grads[0][targets == IGNORE].count_nonzero() == 0


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close(dtype: torch.dtype, bound: float) -> None:
    """The loss is a wide scalar; logits and their gradient are rounded to the compute dtype (BF16: 2^-9)."""
    hidden, weight, targets = inputs(300, 128, 120, dtype)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=120)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss / 300, (hidden, weight))
    expected = reference(hidden, weight, targets, 120, 1 / 300)
    for ours, theirs in zip((loss.detach(), *grads), expected, strict=True):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    assert [grad.dtype for grad in grads] == [dtype, dtype]


def test_scaling_of_bf16_gradients_is_not_biased() -> None:
    """1/2500 rounded to BF16 would put every gradient 0.14 % off."""
    hidden, weight, targets = inputs(500, 64, 64, torch.bfloat16)
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, vocab_size=64), hidden)[0]
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=64)
    scaled = torch.autograd.grad(loss / 2500, hidden)[0]
    ratio = (scaled.double() * plain.double()).sum() / plain.double().square().sum() * 2500
    assert abs(ratio - 1) < 1e-4


def test_large_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]]).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]), vocab_size=3)
    loss.backward()
    assert loss.item() == 600.0
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0], [0.0]]))


def test_all_targets_ignored() -> None:
    hidden, weight, _ = inputs(5, 16, 16, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full((5,), IGNORE), vocab_size=16)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_bf16_logits_stay_fp32_where_products_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without BF16 instructions nothing is rounded before the gradients are: a BF16 rounding of the
    logits (2^-9) would be off by a hundred times these bounds."""
    monkeypatch.setattr("fp8train.layers.head_gemms.cpu_multiplies_bf16", lambda: False)
    hidden, weight, targets = inputs(300, 128, 120, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=120)
    grads = torch.autograd.grad(loss / 300, (hidden, weight))
    expected = reference(hidden, weight, targets, 120, 1 / 300)
    assert abs(loss.item() - expected[0]) < 1e-6 * expected[0]
    for ours, theirs in zip(grads, expected[1:], strict=True):
        # rounded once: half a unit in the last place, of 8 significant bits
        assert ((ours.double() - theirs).abs() <= 2**-8 * theirs.abs() + 1e-9).all()


class _LargeOutputs(TorchDispatchMode):
    """Names of the operations that write a tensor of ``size`` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = func.overloadpacket.__name__ == "t"
        if isinstance(out, Tensor) and out.numel() == self.size and not view:
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.usefixtures("each_cpu")
def test_a_chunk_touches_the_whole_weight_in_gemms_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the cost of a token grows with the vocabulary squared: chunks get shorter as the weight grows."""
    monkeypatch.setattr("fp8train.layers.loss._CPU_CHUNK_BYTES", 1)
    hidden, weight, targets = inputs(128 * 5, 4096, 4096, torch.bfloat16)
    with _LargeOutputs(weight.numel()) as mode:
        linear_cross_entropy(hidden, weight, targets, vocab_size=4096)
    once = [name for name in mode.names if name in ("zeros", "_to_copy", "empty", "empty_like", "zeros_like")]
    per_chunk = [name for name in mode.names if name not in once]
    assert len(once) <= 3
    assert per_chunk in (["addmm_"] * 5, ["mm", "add_"] * 5)


@pytest.mark.parametrize(("grad", "matmuls"), [(True, 3), (False, 1)])
def test_evaluation_computes_no_gradient(grad: bool, matmuls: int) -> None:
    hidden, weight, targets = inputs(7, 16, 16, torch.float32)
    with torch.set_grad_enabled(grad), profile() as trace:
        linear_cross_entropy(hidden, weight, targets, vocab_size=16)
    counts = {event.key: event.count for event in trace.key_averages()}
    assert counts["aten::mm"] + counts.get("aten::addmm_", 0) == matmuls


def test_logits_leave_out_the_padding() -> None:
    hidden, weight, _ = inputs(5, 16, 13, torch.float64)
    torch.testing.assert_close(logits(hidden, weight, vocab_size=13), (hidden @ weight.t())[:, :13])


def test_no_tokens_are_no_loss() -> None:
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(16, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), vocab_size=16)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def softmaxes(parallel: TensorParallel | None, alpha: float) -> list[tuple[Tensor, Tensor]]:
    """Losses [T] of the targets that count and the gradient of the logits [T, V], as the CPU finds them and
    as a GPU does; of this rank's columns."""
    hidden, weight, targets = inputs(40, 32, 29, torch.float32)
    rank, size = (0, 1) if parallel is None else (parallel.rank, parallel.size)
    weight = weight.detach().chunk(size)[rank]
    vocabulary = _Vocabulary(len(weight), 29, parallel)
    found = _Targets.of(targets, vocabulary, torch.float32)
    result = []
    for softmax in (_softmax, _fused_softmax):
        gemms = HeadGemms(weight, rows=40, alphas=Alphas(output=alpha), needs_grad=True)
        losses, gradient = softmax(gemms, hidden.detach(), found, vocabulary, True)
        assert gradient is not None
        result.append((losses[found.weight == 1], gradient.clone()))
    return result


def softmaxes_of_a_rank(group: dist.ProcessGroup, rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """Runs in the pool."""
    ours, alone = CountedGroup(group), CountedGroup(None)
    return softmaxes(TensorParallel(ours, shards=ours, context=alone), 0.75)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_way_of_a_gpu_gives_the_same(gloo_pool, ranks: int) -> None:
    """References of the fused operations; of four ranks the last one has three columns of padding."""
    whole = softmaxes(None, 0.75)
    found = gloo_pool.run(softmaxes_of_a_rank, ranks) if ranks > 1 else [whole]
    for cpu, gpu in found:
        torch.testing.assert_close(gpu[0], whole[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gpu[1], cpu[1], rtol=1e-5, atol=1e-7)
    joined = torch.cat([gpu[1] for _, gpu in found], dim=1)
    torch.testing.assert_close(joined, whole[0][1], rtol=1e-5, atol=1e-7)


def test_shapes_on_a_device_without_memory() -> None:
    hidden = torch.empty(2, 300, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(64, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(2, 300, dtype=torch.int64, device="meta")
    loss = linear_cross_entropy(hidden, weight, targets, vocab_size=60, alphas=Alphas(output=0.5))
    assert loss.shape == () and loss.dtype == torch.float32
    grads = torch.autograd.grad(loss / 600, (hidden, weight))
    assert [grad.shape for grad in grads] == [hidden.shape, weight.shape]
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
