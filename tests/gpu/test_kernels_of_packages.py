"""Transformer Engine's and apex's kernels themselves, where they are installed, against FP64 and our own."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.processes import Processes
from fp8train.kernels.attention import AttentionCall, choose_attention_backend
from fp8train.kernels.multi_tensor import choose_multi_tensor
from fp8train.kernels.norm_backend import choose_norm_backend
from fp8train.kernels.package_kernels import AdamNumbers
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.step.trainer import Trainer
from tests.fakes import exact_norm
from tests.training.tiny import VOCAB, batches, tiny_config

pytestmark = pytest.mark.gpu
EPS, WIDTH = 1e-5, 512


def needs(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


NEEDED = {
    "te": ("transformer_engine", "transformer_engine_torch"),
    "apex": ("amp_C", "fused_layer_norm_cuda"),
}


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("package", NEEDED)
@pytest.mark.parametrize("kind", ["rms", "layer", "layer+bias"])
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms(package: str, kind: str, gain: bool, dtype: torch.dtype) -> None:
    needs(*NEEDED[package])
    device = torch.device("cuda", 0)
    options = {"eps": EPS, "dtype": dtype, "device": device, "gain": gain}
    norm = (
        RMSNorm(WIDTH, **options) if kind == "rms" else LayerNorm(WIDTH, bias=kind == "layer+bias", **options)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + torch.randn(WIDTH, device=device))
    norm.use(choose_norm_backend(device, dtype, wanted=package))
    x, upstream = (torch.randn(700, WIDTH, device=device).to(dtype) + 0.25 for _ in range(2))
    x.requires_grad_()
    y = norm(x)
    got = [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], upstream)]
    with torch.no_grad():
        bias, centred = getattr(norm, "bias", None), kind != "rms"
        exact, mean, inverse = exact_norm.forward(x, norm.weight, bias, EPS, centred=centred)
        grads = exact_norm.backward(upstream, x, mean if centred else None, inverse, norm.weight)
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(got, (exact, *grads), strict=False):
        assert error(one, other) <= tolerance


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention(heads: tuple[int, int], head_dim: int) -> None:
    needs(*NEEDED["te"])
    device, (queries, groups) = torch.device("cuda", 0), heads
    call = AttentionCall(torch.bfloat16, queries, groups, head_dim)
    backend = choose_attention_backend(device, call, wanted="te")
    attend = backend.causal(
        num_heads=queries, num_kv_heads=groups, head_dim=head_dim, scale=0.1, device=device
    )
    assert attend is not None
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, count, 256, head_dim, device=device).bfloat16().requires_grad_()
        for count in (queries, groups, groups)
    ]
    upstream = torch.randn(2, queries, 256, head_dim, device=device).bfloat16()
    mixed = attend(*inputs)
    wide = (x.double() for x in inputs)
    exact = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True, scale=0.1)
    assert error(mixed.detach(), exact.detach()) <= 2.0**-7
    ours = torch.autograd.grad(mixed, inputs, upstream)
    theirs = torch.autograd.grad(exact, inputs, upstream.double())
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other.double()) <= 2.0**-6


def test_adamw() -> None:
    """torch's in FP64; the gradient is multiplied on the device, and overwritten."""
    needs("amp_C")
    device = torch.device("cuda", 0)
    kernels = choose_multi_tensor(device, key="optimizer", wanted="apex")
    assert kernels is not None
    torch.manual_seed(0)
    sizes = (3, 130, 70_000, 1 << 22)
    weights = [torch.randn(size, device=device) for size in sizes]
    exact = [torch.nn.Parameter(weight.double()) for weight in weights]
    optimizer = torch.optim.AdamW(exact, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    clip = torch.tensor(0.7, dtype=torch.float64, device=device)
    for step in (1, 2, 3):
        gradients = [torch.randn(size, device=device).bfloat16() for size in sizes]
        for parameter, gradient in zip(exact, gradients, strict=True):
            parameter.grad = gradient.double() * clip.float().double()
        optimizer.step()
        wide = kernels.widen(gradients)
        assert all(torch.equal(one, gradient.float()) for one, gradient in zip(wide, gradients, strict=True))
        numbers = AdamNumbers(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, step=step, weight_decay=0.1)
        kernels.adam(wide, weights, *moments, numbers, clip)
    for i, parameter in enumerate(exact):
        state = optimizer.state[parameter]
        assert error(weights[i], parameter.detach()) <= 1e-6
        assert error(moments[0][i], state["exp_avg"]) <= 1e-6
        assert error(moments[1][i], state["exp_avg_sq"]) <= 3e-6


def test_norms_of_gradients() -> None:
    needs("amp_C")
    device = torch.device("cuda", 0)
    kernels = choose_multi_tensor(device, key="multi_tensor", wanted="apex")
    assert kernels is not None
    torch.manual_seed(0)
    tensors = [torch.randn(size, device=device) for size in (3, 130, 70_000, 1 << 22)]
    tensors += [torch.empty(0, device=device), torch.randn(999, device=device).bfloat16()]
    exact = torch.stack([tensor.double().norm() for tensor in tensors])
    assert torch.allclose(kernels.norms(tensors).double(), exact, rtol=60 * 2.0**-25, atol=0)


@pytest.mark.parametrize(
    ("kernels", "package"),
    [
        (["kernels.norm=te"], "te"),
        (["kernels.norm=apex"], "apex"),
        (["kernels.attention=te"], "te"),
        (["kernels.optimizer=apex", "kernels.multi_tensor=apex"], "apex"),
    ],
)
def test_training(kernels: list[str], package: str) -> None:
    needs(*NEEDED[package])
    curves = []
    for overrides in ([], kernels):
        config = tiny_config(["model.head_dim=64", "train.global_batch_size=4", *overrides])
        processes = Processes(torch.device("cuda", 0), 1, 0, CountedGroup(None), None)
        trainer = Trainer(config, processes, vocab_size=VOCAB)
        data = batches(config, processes)
        curves.append([float(trainer.step(i, data.batch(i)).loss) for i in range(5)])
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
