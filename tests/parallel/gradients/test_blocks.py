"""Gradients stored in FP8: cast once, at the right moment, and read back as they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8train.comm.collectives import CountedGroup
from fp8train.layers.linear import Linear
from fp8train.numerics.block_scales import as_blocks, dequantize_blocks, from_blocks, quantize_blocks
from fp8train.parallel.gradients.block_storage import BlockStorage, row_blocks
from fp8train.parallel.gradients.bucket import Bucket
from fp8train.parallel.gradients.exchange_sum import ExchangeSum
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets, Groups
from fp8train.parallel.gradients.memory import Memory
from fp8train.parallel.gradients.receivers import Member, Places
from fp8train.parallel.gradients.store import GradientStore
from fp8train.precision.gradients import Fp8Gradients, Gradients
from fp8train.precision.number_formats import E4M3
from fp8train.precision.scale_blocks import block_size
from tests.numerics.fp8_table import E4M3_TABLE
from tests.parallel.gradients.reading import gradient_in, gradient_of

CPU = torch.device("cpu")
WIDTHS = [64, 192, 131]


class Net(nn.Module):
    """Linears of several widths, each with its own block."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(Linear(width, 16, bias=False, dtype=torch.float32) for width in WIDTHS)
        self.gain = nn.Parameter(torch.ones(16))
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, xs: list[Tensor]) -> Tensor:
        """One input per linear -> scalar."""
        return sum((self.gain * linear(x)).square().sum() for linear, x in zip(self.linears, xs, strict=True))


def store_of(net: Net, contributions: int, **fp8: Any) -> GradientStore:
    plan = GradientBuckets(
        dict(net.named_parameters()),
        Gradients(bucket_mib=1.0, format=E4M3, fp8=Fp8Gradients(**fp8)),
        groups=Groups(CountedGroup(None)),
        device=CPU,
        in_fp8_plan=[f"linears.{i}.weight" for i in range(len(WIDTHS))],
        contributions=contributions,
    )
    store = GradientStore(net, plan)
    for i, linear in enumerate(net.linears):
        linear.connect(sink_slot=store.sink_slot(f"linears.{i}.weight"))
    return store


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, width, generator=generator) for width in WIDTHS]


def autograd(net: Net, batches: list[list[Tensor]]) -> list[dict[str, Tensor]]:
    """Gradients of each micro-batch by plain formulas."""
    result = []
    for xs in batches:
        weights = [linear.weight.detach().clone().requires_grad_() for linear in net.linears]
        gain = net.gain.detach().clone().requires_grad_()
        sum((gain * (x @ w.t())).square().sum() for x, w in zip(xs, weights, strict=True)).backward()
        grads = {f"linears.{i}.weight": w.grad for i, w in enumerate(weights)}
        result.append({**grads, "gain": gain.grad})
    return result


def stored(value: Tensor) -> Tensor:
    """What FP8 storage makes of a gradient, through the table of the format in Python."""
    block = block_size(value.shape[-1])
    blocks = as_blocks(value, block)
    rows = []
    for row in blocks.tolist():
        amax = max(map(abs, row))
        exponent = 0
        while amax * 2.0**exponent > 448.0:
            exponent -= 1
        while 0 < amax * 2.0 ** (exponent + 1) <= 448.0:
            exponent += 1
        codes = [E4M3_TABLE.encode(x * 2.0**exponent) for x in row]
        rows.append([E4M3_TABLE.decode(code) * 2.0**-exponent for code in codes])
    return from_blocks(torch.tensor(rows), value.shape)


@pytest.mark.parametrize(("name", "accumulate"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_micro_batches_add_up_before_the_one_cast(name: str, accumulate: torch.dtype) -> None:
    net = Net()
    store = store_of(net, 3, accumulate=name)
    for seed in (10, 20):  # the second step must not see the first
        batches = [inputs(seed + i) for i in range(3)]
        store.begin_step(3)
        for xs in batches:
            net(xs).backward()
        store.finish()
        expected = autograd(net, batches)
        for i in range(len(WIDTHS)):
            fqn = f"linears.{i}.weight"
            total = expected[0][fqn].to(accumulate)
            for one in expected[1:]:
                total = total.add(one[fqn]) if accumulate == torch.float32 else total.clone().add_(one[fqn])
            torch.testing.assert_close(gradient_of(store, fqn), stored(total.float()), rtol=2**-3, atol=0)
            close = (gradient_of(store, fqn) == stored(total.float())).float().mean()
            assert close > 0.995, fqn  # an ulp of the FP32 product may flip a code
        torch.testing.assert_close(gradient_of(store, "gain"), sum(one["gain"] for one in expected))


def test_a_single_micro_batch_is_cast_as_it_is_produced() -> None:
    net = Net()
    store = store_of(net, 1)
    fp8 = [bucket for bucket in store.buckets if isinstance(bucket.storage, BlockStorage)]
    assert sum(bucket.storage.accumulator_bytes for bucket in fp8) == 0
    elements = sum(16 * width for width in WIDTHS)
    padding = 16 * (256 - 131)  # rows of 131 end in a short block of 128
    scales = 16 * (1 + 2 + 2)
    assert sum(bucket.storage.stored_bytes for bucket in fp8) == elements + padding + scales
    batch = inputs(1)
    store.begin_step(1)
    net(batch).backward()
    store.finish()
    for i in range(len(WIDTHS)):
        fqn = f"linears.{i}.weight"
        assert (gradient_of(store, fqn) == stored(autograd(net, [batch])[0][fqn])).float().mean() > 0.995


def test_the_optimizer_reads_pieces_of_what_is_stored() -> None:
    net = Net()
    store = store_of(net, 1)
    store.begin_step(1)
    net(inputs(2)).backward()
    store.finish()
    squares = 0.0
    for fqn, parameter in net.named_parameters():
        whole = gradient_of(store, fqn).reshape(-1)
        squares += float(whole.double().square().sum())
        reader = store.reader(fqn)
        for start in range(0, parameter.numel(), 64):
            stop = min(start + 64, parameter.numel())
            assert torch.equal(reader.chunk(start, stop), whole[start:stop]), (fqn, start)
    assert float(store.global_norm()) == pytest.approx(squares**0.5, rel=1e-12)


def bucket_of(accumulate: torch.dtype | None, **changes: Any) -> Bucket:
    members = [Member("w", (4, 256))]
    places = Places(members, row_blocks(members, 128))
    storage = BlockStorage(places, block=128, fmt=E4M3, accumulate=accumulate, memory=Memory(CPU), **changes)
    return Bucket(storage, ExchangeSum(storage, None))


def test_many_small_contributions_are_not_swamped() -> None:
    """A first micro-batch of 1 and 255 of 1/64 sum to 4.98. Added to nearest in FP8 they never leave 1, as
    in MS-AMP; in BF16 they get to 4, where 1/64 is half its spacing; in FP32 only the one cast is lost."""
    reached = {}
    for accumulate in (torch.bfloat16, torch.float32):
        bucket = bucket_of(accumulate)
        for i in range(256):
            bucket.add(0, torch.full((4, 256), 1 / 64 if i else 1.0), first=i == 0)
        bucket.launch()
        bucket.advance()
        bucket.finish()
        assert len(gradient_in(bucket, 0).unique()) == 1
        reached[accumulate] = float(gradient_in(bucket, 0).max())
    in_fp8, scale = quantize_blocks(torch.ones(1, 128), E4M3)
    for _ in range(255):
        in_fp8, scale = quantize_blocks(dequantize_blocks(in_fp8, scale) + 1 / 64, E4M3)
    assert float(dequantize_blocks(in_fp8, scale).max()) == 1.0, "FP8 accumulation is expected to fail"
    assert reached == {torch.bfloat16: 4.0, torch.float32: 5.0}


def test_error_feedback_loses_nothing_over_time() -> None:
    """A constant gradient whose cast is 4 % off: the mean of what was handed over approaches it."""
    value = torch.full((4, 256), 1.0)
    value[:, ::2] = 1.0625  # half-way between two E4M3 values
    plain, corrected = bucket_of(None), bucket_of(None, error_feedback=True)
    totals = []
    for bucket in (plain, corrected):
        total = torch.zeros(4, 256)
        for _ in range(32):
            run_step(bucket, value)
            bucket.commit()
            total += gradient_in(bucket, 0)
        totals.append(float((total / 32 - value).abs().max()))
    assert totals[0] == 0.0625
    assert totals[1] < 0.0625 / 16


def residual_of(bucket: Bucket) -> Tensor:
    assert isinstance(bucket.storage, BlockStorage)
    assert bucket.storage.residual is not None
    return bucket.storage.residual.float()


@pytest.mark.parametrize("accumulate", [None, torch.bfloat16])
def test_error_feedback_keeps_what_applied_steps_lost_as_far_as_they_were_applied(
    accumulate: torch.dtype | None,
) -> None:
    """Beside arithmetic in FP64: the loss of a cast, times the clip factor, and nothing of skipped steps."""
    bucket = bucket_of(accumulate, error_feedback=True)
    value = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    run_step(bucket, value)
    lost = (value.double() - gradient_in(bucket, 0).double()).view(-1, 128)
    assert float(residual_of(bucket).abs().max()) == 0.0, "the step is not yet known to be applied"
    bucket.commit(torch.tensor(0.25, dtype=torch.float64))
    assert float(lost.abs().max()) > 0.01
    torch.testing.assert_close(residual_of(bucket).double(), lost * 0.25, rtol=2**-7, atol=0)
    before = residual_of(bucket).clone()
    for spike in (1e6, float("nan")):  # never committed: skipped
        run_step(bucket, value * spike)
        assert torch.equal(residual_of(bucket), before)
    run_step(bucket, value)
    arrived = (value.double().view(-1, 128) + before.double()).view(4, 256)
    coefficient = (gradient_in(bucket, 0).double() * arrived).sum() / arrived.square().sum()
    assert float(coefficient) == pytest.approx(1.0, abs=0.01)


def run_step(bucket: Bucket, value: Tensor) -> None:
    """One contribution, cast and reduced."""
    bucket.begin()
    bucket.add(0, value, first=True)
    bucket.launch()
    bucket.advance()
    bucket.finish()


def test_a_gradient_that_is_not_finite_makes_the_norm_not_finite() -> None:
    for bad in (float("inf"), float("nan")):
        bucket = bucket_of(torch.bfloat16)
        value = torch.ones(4, 256)
        value[3, 200] = bad
        bucket.add(0, value, first=True)
        bucket.launch()
        bucket.finish()
        assert torch.isnan(bucket.norms(torch.float64)[0])


class _Fused(TorchDispatchMode):
    """Names of the fused operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fp8train":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("own_norms", [False, True])
@pytest.mark.parametrize("accumulate", [None, torch.bfloat16])
def test_launches_of_a_step_off_the_cpu(
    accumulate: torch.dtype | None, own_norms: bool, error_feedback: bool
) -> None:
    """One cast of each gradient or of the whole bucket, and one pass for all norms where no cast found
    them."""
    meta = torch.device("meta")
    members = [Member("a", (4, 256)), Member("b", (8, 131)), Member("c", (2, 512))]
    places = Places(members, row_blocks(members, 128), pad_to=4)
    options = {"error_feedback": error_feedback, "own_norms": own_norms}
    storage = BlockStorage(places, block=128, fmt=E4M3, accumulate=accumulate, memory=Memory(meta), **options)
    bucket = Bucket(storage, ExchangeSum(storage, None))
    with _Fused() as fused:
        bucket.begin()
        for member, shape in enumerate(m.shape for m in members):
            bucket.add(member, torch.empty(shape, dtype=torch.bfloat16, device=meta), first=True)
        bucket.launch()
        bucket.advance()
        bucket.finish()
        norms = bucket.norms(torch.float32)
        bucket.commit(torch.empty((), device=meta))
    assert norms.shape == (3,) and norms.dtype == torch.float64
    casts = ["cast_blocks"] * (3 if accumulate is None else 1)
    assert fused.names == casts + ([] if own_norms else ["squares_of_blocks"])
