"""Launchers of norms: statistics against FP64, what follows bit for bit, gradients against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fp8train.kernels import norms
from fp8train.kernels.operands import CastRule, cast_operand
from fp8train.layers.norm import LayerNorm, RMSNorm
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.gpu.same import same

EPS = 1e-5
SHAPES = [(5, 64), (150, 48), (3, 1000), (2, 8192)]
KINDS: list[Any] = ["rms", "layer"]
DTYPES = [torch.bfloat16, torch.float32]

GRADIENTS = [
    *((shape, torch.bfloat16, True) for shape in SHAPES),
    *((shape, torch.float32, False) for shape in SHAPES),
    pytest.param(
        (260, 8200), torch.bfloat16, True, marks=pytest.mark.slow
    ),  # two rows a program, sums in memory
]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> dict[str, Tensor | None]:
    return {
        "x": draw(*shape, seed=0, dtype=dtype) * 3 + 0.5,
        "delta": draw(*shape, seed=1, dtype=dtype),
        "weight": draw(shape[1], seed=2, dtype=dtype) + 1,
        "bias": draw(shape[1], seed=3, dtype=dtype) if kind == "layer" else None,
    }


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the order of sums, which may move the last bit of BF16."""
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2e-6
    error = (a.double() - b.double()).abs()
    return bool((error <= tolerance * b.double().abs() + 2e-6 * b.double().abs().max()).all())


def shapes_of(results: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in results]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "branch"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_the_sum_its_statistics_and_its_norm(
    kind: Any, shape: tuple[int, int], dtype: torch.dtype, branch: bool
) -> None:
    x, delta, weight, bias = inputs(shape, dtype, kind).values()
    assert x is not None and delta is not None
    args = (x, delta if branch else None, weight, bias, EPS, kind, True, True)
    stream, y, mean, rstd, partials = launched = norms._residual_norm_op.launch(*args)
    assert shapes_of(launched) == shapes_of(norms._residual_norm_fake(*args))
    whole = x + delta if branch else x
    assert same(stream, whole if branch else x.new_empty(0))
    true = whole.double()
    true_mean = true.mean(1) if kind == "layer" else torch.zeros(shape[0], dtype=torch.float64)
    variance = (true - true_mean[:, None]).square().mean(1)
    torch.testing.assert_close(rstd.double(), (variance + EPS).rsqrt(), rtol=5e-7, atol=0)
    if kind == "layer":
        torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-7)
    assert same(y, norms._norm(whole, mean if kind == "layer" else None, rstd, weight, bias))
    assert partials.max() == y.abs().max()
    reference = norms.residual_norm(*args[:4], eps=EPS, kind=kind, want_partials=True)
    assert close(y, reference.y, dtype) and close(rstd, reference.rstd, torch.float32)
    assert same(reference.stream, whole) and reference.partials.max() == reference.y.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("shape", [(40, 48), (3, 4096)], ids=str)
def test_references_are_the_layers(dtype: torch.dtype, gain: bool, shape: tuple[int, int]) -> None:
    x, delta, weight, bias = inputs(shape, dtype, "layer").values()
    assert x is not None and delta is not None and weight is not None and bias is not None
    grad_y, stream = draw(*shape, seed=4, dtype=dtype), (x + delta).requires_grad_()
    rms = RMSNorm(shape[1], eps=EPS, dtype=dtype, gain=gain)
    layer = LayerNorm(shape[1], eps=EPS, bias=True, dtype=dtype, gain=gain)
    for module in (rms, layer):
        module.load_state_dict({"weight": weight, "bias": bias} if gain else {}, strict=False)
    for kind, module in (("rms", rms), ("layer", layer)):
        kept = None if not gain or kind == "rms" else bias
        out = norms.residual_norm(x, delta, weight if gain else None, kept, eps=EPS, kind=kind)  # type: ignore[arg-type]
        y = module(stream)
        stream.grad = None
        y.backward(grad_y)
        back = norms.norm_backward(
            grad_y, None, out.stream, out.mean, out.rstd, weight if gain else None, want_bias=kept is not None
        )
        if kind == "rms":
            assert same(out.y, y) and same(back.stream, stream.grad)
        assert close(out.y, y, dtype) and close(back.stream, stream.grad, dtype)
        for name, gradient in (("weight", back.weight), ("bias", back.bias)):
            parameter = getattr(module, name, None)
            assert parameter is None or close(gradient, parameter.grad, dtype), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype", "other"), GRADIENTS, ids=str)
def test_gradients_are_autograds_in_fp64(
    kind: Any, shape: tuple[int, int], dtype: torch.dtype, other: bool
) -> None:
    x, grad_stream, weight, bias = inputs(shape, dtype, kind).values()
    assert x is not None and grad_stream is not None and weight is not None
    grad_y, y = (
        draw(*shape, seed=4, dtype=dtype),
        norms.residual_norm(x, None, None, None, eps=EPS, kind=kind),
    )
    args = (grad_y, grad_stream if other else None, x, y.mean, y.rstd, weight, bias is not None)
    grad, grad_weight, grad_bias, partials = launched = norms._norm_backward_op.launch(*args)
    assert shapes_of(launched) == shapes_of(norms._norm_backward_fake(*args))
    true = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    if kind == "layer":
        out = F.layer_norm(true[0], shape[1:], true[1], true[2], EPS)  # type: ignore[arg-type]
    else:
        out = F.rms_norm(true[0], shape[1:], true[1], EPS)  # type: ignore[arg-type]
    out.backward(grad_y.double())
    own = true[0].grad.to(dtype)  # type: ignore[union-attr]
    if other:  # two roundings: of the norm's own gradient, then of the sum
        alone = norms._norm_backward_op.launch(grad_y, None, *args[2:])[0]
        assert close(alone, own, dtype) and same(grad, alone + grad_stream)
    else:
        assert close(grad, own, dtype)
    for found, parameter in ((grad_weight, true[1]), (grad_bias, true[2])):
        assert parameter is None or close(found, parameter.grad, dtype)  # type: ignore[arg-type]
    assert partials.max() == grad.abs().max()
    for ours, theirs in zip(launched[:3], norms._norm_backward(*args)[:3], strict=True):
        assert close(ours, theirs, dtype) if ours.numel() else same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [QuantSpec(E4M3), QuantSpec(E5M2, power_of_two=False)], ids=str)
@pytest.mark.parametrize("shape", [(64, 128), (67, 131), (1, 4096), (0, 32)], ids=str)
def test_the_cast_of_a_norm(kind: Any, spec: QuantSpec, shape: tuple[int, int]) -> None:
    x, _, weight, bias = inputs(shape, torch.bfloat16, kind).values()
    assert x is not None
    out = norms.residual_norm(x, None, weight, bias, eps=EPS, kind=kind, want_partials=True)
    inputs_ = (x, out.mean, out.rstd, weight, bias)
    launched_values, launched_amax, launched_cast = (op.launch for op in norms._values.operations)
    rule = CastRule.of(spec)
    operand = launched_cast(*inputs_, out.partials, None, *rule, True, True)
    expected = norms.norm_cast(*inputs_, partials=out.partials, rule=rule, turned=True)
    plain = cast_operand(out.y, out.partials, rule, turned=True)
    for ours, reference, values in zip(operand, expected, plain, strict=True):
        assert same(ours, reference) and same(ours, values)
    assert same(launched_values(*inputs_), out.y) and same(norms.norm_again(*inputs_), out.y)
    if shape[0]:
        assert launched_amax(*inputs_).max() == out.y.abs().max()


def test_rows_that_are_not_finite_spoil_no_others() -> None:
    x, weight = draw(20, 256, seed=0), draw(256, seed=1)
    x[3, 7], x[11, 0] = torch.nan, torch.inf
    for kind in KINDS:
        args = (x, None, weight, None, EPS, kind, True, True)
        _, y, mean, rstd, partials = norms._residual_norm_op.launch(*args)
        assert partials.isnan().any()
        assert set(y.isnan().any(1).nonzero().flatten().tolist()) == {3, 11}
        args = (x, None, x, mean if kind == "layer" else None, rstd, weight, False)
        grad, _, _, partials = norms._norm_backward_op.launch(*args)
        assert partials.isnan().any()
        assert set(grad.isnan().any(1).nonzero().flatten().tolist()) == {3, 11}


def test_without_rows_and_without_a_weight() -> None:
    x = draw(0, 96, seed=0)
    out = norms._residual_norm_op.launch(x, x, None, None, EPS, "layer", True, True)
    assert out[1].shape == (0, 96) and out[4].tolist() == [0.0]
    weight = draw(96, seed=1)
    back = norms._norm_backward_op.launch(x, x, x, out[2], out[3], weight, True)
    assert not back[1].any() and not back[2].any() and back[3].tolist() == [0.0]
    x = draw(9, 96, seed=2)
    out = norms._residual_norm_op.launch(x, None, None, None, EPS, "rms", True, False)
    assert same(out[1], norms._norm(x, None, out[3], None, None)) and out[4].numel() == 0
    args = (draw(9, 96, seed=3), None, x, None, out[3], None, False)
    back = norms._norm_backward_op.launch(*args)
    assert back[1].numel() == 0 and close(back[0], norms._norm_backward(*args)[0], x.dtype)


def test_rows_longer_than_registers_are_left_to_torch() -> None:
    x, weight = draw(2, 16400, seed=0), draw(16400, seed=1)
    args = (x, x, weight, None, EPS, "rms", True, True)
    out = norms._residual_norm_op.launch(*args)
    assert shapes_of(out) == shapes_of(norms._residual_norm_fake(*args))
    assert same(out[1], norms._residual_norm(*args)[1]) and out[4].max() == out[1].abs().max()
    args_back = (x, x, x, None, out[3], weight, False)
    back = norms._norm_backward_op.launch(*args_back)
    assert shapes_of(back) == shapes_of(norms._norm_backward_fake(*args_back))
    assert same(back[1], norms._norm_backward(*args_back)[1])
