"""The gradient store: what goes in comes out once, in order, or an error names the parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8train.comm.collectives import CountedGroup
from fp8train.layers.linear import Linear
from fp8train.models.build import build_model, initialise
from fp8train.models.connect import connect_linears, make_fp8_parts
from fp8train.models.decoder import Decoder
from fp8train.parallel.gradients.gradient_buckets import GradientBuckets, Groups
from fp8train.parallel.gradients.store import GradientStore
from fp8train.precision.gradients import Gradients
from tests.parallel.gradients.reading import gradient_of
from tests.training.tiny import VOCAB, alone, batches, tiny_config


class Net(nn.Module):
    """One linear of ours, one parameter served by autograd."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = Linear(8, 8, bias=True, dtype=dtype)
        self.gain = nn.Parameter(torch.ones(8, dtype=dtype))
        for parameter in (self.linear.weight, self.linear.bias):
            assert parameter is not None
            nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, 8] -> scalar."""
        return (self.linear(x) * self.gain).square().sum()


def store_of(model: nn.Module, **changes) -> GradientStore:
    arguments = dict(
        gradients=Gradients(bucket_mib=1.0),
        groups=Groups(CountedGroup(None)),
        device=torch.device("cpu"),
    )
    store = GradientStore(model, GradientBuckets(dict(model.named_parameters()), **{**arguments, **changes}))
    for path, module in model.named_modules():
        if isinstance(module, Linear) and not isinstance(model, Decoder):
            module.connect(sink_slot=store.sink_slot(f"{path}.weight"))
    return store


def reference(net: Net, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients through plain autograd."""
    weight, bias, gain = (
        t.detach().clone().requires_grad_() for t in (net.linear.weight, net.linear.bias, net.gain)
    )
    for x in inputs:
        ((x @ weight.t() + bias) * gain).square().sum().backward()
    return {"linear.weight": weight.grad, "linear.bias": bias.grad, "gain": gain.grad}


@pytest.mark.parametrize("bucket_bytes", [1, 600, 1 << 20])
def test_sums_micro_batches_and_leaves_no_grad(bucket_bytes: int) -> None:
    torch.manual_seed(0)
    net = Net()
    store = store_of(net, gradients=Gradients(bucket_mib=bucket_bytes / 2**20))
    for _ in range(2):  # the second step must not see the first
        inputs = [torch.randn(5, 8, dtype=torch.float64) for _ in range(3)]
        store.begin_step(3)
        for x in inputs:
            net(x).backward()
            assert all(p.grad is None for p in net.parameters())
        store.finish()
        for fqn, expected in reference(net, inputs).items():
            torch.testing.assert_close(gradient_of(store, fqn), expected, rtol=1e-12, atol=1e-12)
        total = sum(float(g.square().sum()) for g in reference(net, inputs).values()) ** 0.5
        assert float(store.global_norm()) == pytest.approx(total, rel=1e-12)
    assert len(store.buckets) == {1: 3, 600: 2, 1 << 20: 1}[bucket_bytes]


def test_what_a_graph_contributes_is_reduced_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Net()
    store = store_of(net, gradients=Gradients(bucket_mib=2**-20))
    order: list[tuple[int, str]] = []
    for number, bucket in enumerate(store.buckets):
        for name in ("launch", "advance", "finish"):
            call = getattr(bucket, name)
            monkeypatch.setattr(
                bucket, name, lambda call=call, seen=(number, name): (order.append(seen), call())[1]
            )
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = reference(net, [x])
    store.begin_step(1, launch=False)
    net(x).backward()
    assert not order
    store.finish()
    as_always = [(0, "launch"), (1, "launch"), (0, "advance"), (2, "launch"), (1, "advance"), (2, "advance")]
    assert order == [*as_always, (0, "finish"), (1, "finish"), (2, "finish")]
    order.clear()
    store.begin_step(1, launch=False)  # the buffers have it all: as behind a replay
    store.replayed()
    store.finish()
    assert order[: len(as_always)] == as_always
    for fqn, gradient in expected.items():
        torch.testing.assert_close(gradient_of(store, fqn), gradient, rtol=1e-12, atol=1e-12)


def test_too_few_and_too_many_contributions_name_the_parameter() -> None:
    net = Net()
    store = store_of(net)
    store.begin_step(2)
    net(torch.randn(2, 8, dtype=torch.float64)).backward()
    with pytest.raises(
        RuntimeError, match=r"3 parameters lack gradient contributions: linear.bias \(1 of 2\)"
    ):
        store.finish()
    store.begin_step(1)
    net(torch.randn(2, 8, dtype=torch.float64)).backward()
    with pytest.raises(RuntimeError, match="contribution 2 in a step that expects 1"):
        net(torch.randn(2, 8, dtype=torch.float64)).backward()


def test_an_unused_parameter_is_named() -> None:
    net = Net()
    net.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    store = store_of(net)
    store.begin_step(1)
    net(torch.randn(2, 8, dtype=torch.float64)).backward()
    with pytest.raises(RuntimeError, match=r"1 parameters lack gradient contributions: unused \(0 of 1\)"):
        store.finish()


def test_bf16_accumulation_rounds_as_bf16_addition_does() -> None:
    torch.manual_seed(0)
    net = Net(torch.float32)
    store = store_of(net, gradients=Gradients(accumulate="bf16", reduce="bf16"))
    inputs = [torch.randn(5, 8) for _ in range(3)]
    store.begin_step(3)
    for x in inputs:
        net(x).backward()
    store.finish()
    expected = torch.zeros(8, dtype=torch.bfloat16)
    for x in inputs:
        expected = expected + reference(net, [x])["gain"].to(torch.bfloat16)
    assert store.values("gain").dtype == torch.bfloat16
    # one contribution is rounded once more on entry: at most an ulp apart
    torch.testing.assert_close(store.values("gain"), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("fp8", ["true", "false"])
def test_a_decoder_with_a_store_has_the_gradients_of_one_without(family: str, fp8: str) -> None:
    config = tiny_config([f"model.family={family}", f"precision.gemm.fp8={fp8}", "precision.compute=fp64"])
    tokens = batches(config, alone()).batch(0)[0]

    def built(*, with_store: bool):
        built = build_model(config, vocab_size=VOCAB, device=torch.device("cpu"))
        store = store_of(built.model) if with_store else None
        connect_linears(built, make_fp8_parts(built), sink_slot=store and store.sink_slot)
        initialise(built.model, 1)
        return built.model, store

    (plain, _), (stored, store) = built(with_store=False), built(with_store=True)
    assert store is not None
    plain(tokens[:, :-1], tokens[:, 1:]).backward()
    store.begin_step(1)
    stored(tokens[:, :-1], tokens[:, 1:]).backward()
    store.finish()
    for fqn, parameter in plain.named_parameters():
        assert torch.equal(gradient_of(store, fqn), parameter.grad), fqn  # a tied embedding counts both uses
