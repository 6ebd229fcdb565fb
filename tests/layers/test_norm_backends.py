"""Norms by Transformer Engine and apex, through fakes that check each call and compute in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8train.kernels.norm_backend import AUTO, choose_norm_backend
from fp8train.layers.norm import LayerNorm, RMSNorm
from tests.fakes import apex_fake, exact_norm, te_layers_fake
from tests.fakes.transformer_engine_fake import install

CPU, EPS = torch.device("cpu"), 1e-3
Norm = RMSNorm | LayerNorm
Calls = list[str]


def anywhere(device: torch.device) -> None:
    """The fakes run on any device."""


@pytest.fixture(params=["te", "apex"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Calls]:
    if request.param == "te":
        return "te", install(monkeypatch, te_layers_fake.norms).calls
    return "apex", apex_fake.install(monkeypatch).calls


def make(kind: str, dtype: torch.dtype, **options: Any) -> Norm:
    if kind == "rms":
        norm: Norm = RMSNorm(48, eps=EPS, dtype=dtype, **options)
    else:
        norm = LayerNorm(48, eps=EPS, bias=kind == "layer+bias", dtype=dtype, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + torch.randn(48, generator=generator))
    return norm


def run(norm: Norm, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """y, and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], upstream)]


def inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, upstream = (torch.randn(*shape, 48, generator=generator) + 0.2 for _ in range(2))
    return x.to(dtype), upstream.to(dtype)


@torch.no_grad()
def exact(norm: Norm, x: Tensor, upstream: Tensor, grad_factor: float) -> list[Tensor]:
    centred, flat = isinstance(norm, LayerNorm), x.reshape(-1, 48)
    bias = getattr(norm, "bias", None)
    y, mean, inverse = exact_norm.forward(flat, norm.weight, bias, EPS, centred=centred)
    grads = exact_norm.backward(
        upstream.reshape(-1, 48), flat, mean if centred else None, inverse, norm.weight
    )
    vectors = [g * grad_factor for g in grads[1:]][: len(list(norm.parameters()))]
    return [y.view(x.shape), grads[0].view(x.shape), *vectors]


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error, of the norm of a tensor."""
    pairs = zip(got, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("centred", [False, True])
def test_what_the_fakes_compute_is_what_autograd_does(centred: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((7, 48), (48,), (48,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    function = torch.nn.functional.layer_norm if centred else torch.nn.functional.rms_norm
    y = function(x, (48,), weight, bias, EPS) if centred else function(x, (48,), weight, EPS) + bias
    upstream = torch.randn(7, 48, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ours, mean, inverse = exact_norm.forward(x, weight, bias, EPS, centred=centred)
        grads = exact_norm.backward(upstream, x, mean if centred else None, inverse, weight)
    theirs = [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
    assert worst([ours, *grads], theirs) <= 1e-13


@pytest.mark.parametrize("kind", ["rms", "layer", "layer+bias"])
@pytest.mark.parametrize("options", [{}, {"gain": False}, {"gain_grad": 0.25}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(
    package: tuple[str, Calls], kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Of the package: one rounding of the result, and of what backward is handed."""
    name, calls = package
    norm = make(kind, dtype, **options)
    norm.use(choose_norm_backend(CPU, dtype, wanted=name, runs_on=anywhere))
    x, upstream = inputs(dtype, 3, 20)
    got = run(norm, x, upstream)
    assert len(calls) == 2 and all(tensor.dtype == dtype for tensor in got)
    assert f"by {name}" in repr(norm)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    assert worst(got, exact(norm, x, upstream, options.get("gain_grad", 1.0))) <= unit
    # And our own, of the same maths, within its roundings.
    norm.use(AUTO)
    assert worst(got, run(norm, x, upstream)) <= 4 * unit


def test_heads_that_are_slices(package: tuple[str, Calls]) -> None:
    """Query norms get views whose rows are apart; kernels get rows in memory of their own."""
    norm = make("rms", torch.bfloat16)
    norm.use(choose_norm_backend(CPU, torch.bfloat16, wanted=package[0], runs_on=anywhere))
    wide, upstream = inputs(torch.bfloat16, 2, 5, 4, 3)
    x = wide[..., :2, :]
    assert not x.is_contiguous()
    got = run(norm, x, upstream[..., :2, :])
    assert worst(got, exact(norm, x, upstream[..., :2, :], 1.0)) <= 2.0**-8


Break = Callable[[pytest.MonkeyPatch], None]


def _with(name: str, change: Callable[..., Any]) -> Break:
    real = getattr(exact_norm, name)
    return lambda patch: patch.setattr(exact_norm, name, lambda *a, **k: change(real, *a, **k))


@pytest.mark.parametrize(
    "wrong",
    [
        _with("forward", lambda real, x, w, b, eps, **k: real(x, w, b, 0.0, **k)),
        _with("forward", lambda real, x, w, b, eps, **k: real(x, None if w is None else 1 + w, b, eps, **k)),
        _with("forward", lambda real, *a, centred: real(*a, centred=not centred)),
        _with("backward", lambda real, g, x, m, r, w: real(g, x, m, 1 / r, w)),
    ],
    ids=["eps forgotten", "gain from zero", "centred", "standard deviation for its inverse"],
)
def test_a_wrong_kernel_would_be_seen(
    package: tuple[str, Calls], wrong: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = make("rms", torch.float32)
    x, upstream = inputs(torch.float32, 30)
    right = exact(norm, x, upstream, 1.0)
    norm.use(choose_norm_backend(CPU, torch.float32, wanted=package[0], runs_on=anywhere))
    wrong(monkeypatch)
    assert worst(run(norm, x, upstream), right) > 1e-4


def test_arguments_that_the_kernels_misread_are_caught(package: tuple[str, Calls]) -> None:
    """The fakes' own checks: another type, rows that are apart."""
    backend = choose_norm_backend(CPU, torch.float32, wanted=package[0], runs_on=anywhere)
    assert backend.rms is not None and backend.layer is not None
    x = torch.ones(4, 48)
    for function in (backend.rms, backend.layer):
        with pytest.raises(AssertionError):
            function(x, torch.ones(48, dtype=torch.bfloat16), None, EPS)
        with pytest.raises(AssertionError):
            function(torch.ones(48, 4).t(), torch.ones(48), None, EPS)


def test_refusals(package: tuple[str, Calls]) -> None:
    name, calls = package
    with pytest.raises(ValueError, match=f"`norm`: {name} is for CUDA devices, and this is a CPU"):
        choose_norm_backend(CPU, torch.bfloat16, wanted=name)
    with pytest.raises(ValueError, match=f"`norm`: {name} computes in bfloat16 and float32, not in float64"):
        choose_norm_backend(CPU, torch.float64, wanted=name, runs_on=anywhere)
    meta = choose_norm_backend(torch.device("meta"), torch.bfloat16, wanted=name)
    assert (meta.rms, meta.layer, meta.fuses) == (None, None, False)
    assert choose_norm_backend(CPU, torch.float64).fuses and not calls


@pytest.mark.parametrize(("name", "says"), [("te", "Transformer Engine"), ("apex", "NVIDIA apex")])
def test_a_package_that_is_not_here(name: str, says: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"{says}.* cannot be imported"):
        choose_norm_backend(CPU, torch.bfloat16, wanted=name, runs_on=anywhere)


def test_an_apex_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    apex_fake.install(monkeypatch)
    monkeypatch.delattr(apex_fake.FusedLayerNormCuda, "rms_backward")
    with pytest.raises(RuntimeError, match="fused_layer_norm_cuda has no rms_backward; build NVIDIA's"):
        choose_norm_backend(CPU, torch.bfloat16, wanted="apex", runs_on=anywhere)
