"""A linear with simulated NVFP4 operands, against float64 products of the operands.

The operands come from the quantiser alone (proved in tests/numerics/test_nvfp4.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.numerics.nvfp4 import hadamard, quantize_nvfp4
from fp8train.numerics.statistics import CastRecorder
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E2M1
from fp8train.precision.operand_cast import QuantSpec
from tests.layers.test_linear import CPU, DTYPES, ListSink, assert_product, make, run
from tests.training.tiny import tiny_config

SHAPES = [((3, 7), 40, 72), ((2, 75), 300, 136), ((1,), 16, 32)]
NV = QuantSpec(E2M1, granularity="nv_1x16", power_of_two=False)


def recipe() -> LinearQuant:
    overrides = ["precision.gemm.fp8=true", "precision.recipe=nvfp4_simulated"]
    quant = tiny_config(overrides).precision.gemm.value()
    assert quant is not None
    return quant


def values(x: Tensor, contracted: int, *, square: bool = False, gradient: bool = False) -> Tensor:
    """What an operand stands for, float64."""
    source = x.detach().float()
    payload, scale_inv = quantize_nvfp4(
        source, source.abs().max(), x.dtype, contracted=contracted, square=square, stochastic=gradient
    )
    return payload.double() * scale_inv.double()


def transformed(x: Tensor) -> Tensor:
    return hadamard(x.detach() if x.dtype == torch.float64 else x.detach().float(), 0).float()


@pytest.mark.usefixtures("each_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sink", [False, True], ids=["autograd", "sink"])
def test_the_three_gemms_multiply_what_the_recipe_says(dtype: torch.dtype, with_sink: bool) -> None:
    for shape in SHAPES:
        sink = ListSink()
        case = make(dtype, shape, quant=recipe(), sink=sink if with_sink else None)
        buffer = sink.buffers[0] if with_sink else None
        output, grad_input, grad_weight = run(case)
        grad_weight = grad_weight if buffer is None else buffer
        n, k = case.layer.weight.shape
        x, g, w = case.x.reshape(-1, k), case.grad_output.reshape(-1, n), case.layer.weight
        square = values(w, 1, square=True)
        assert torch.equal(square, values(w, 0, square=True))  # the same values in both directions
        assert_product(output.reshape(-1, n), values(x, 1), square.t(), 1.0)
        assert_product(grad_input.reshape(-1, k), values(g, 1, gradient=True), square, 1.0)
        back_g, back_x = transformed(g), transformed(x)
        assert_product(grad_weight, values(back_g, 0, gradient=True).t(), values(back_x, 0), 1.0)


def test_weight_gradients_are_right_on_average() -> None:
    """Gradients that differ by a factor are rounded independently, so what their rounding does averages out;
    the rounding of x, to nearest, stays."""
    case = make(torch.float32, ((512,), 64, 48), quant=recipe())
    x = case.x.detach().clone()
    x[100] *= 30
    exact = case.grad_output.t().double() @ x.double()

    def error(grad_outputs: list[Tensor]) -> float:
        total = torch.zeros_like(exact)
        for g in grad_outputs:
            case.layer.weight.grad = None
            case.layer(x).backward(g)
            assert case.layer.weight.grad is not None
            total += case.layer.weight.grad.double() / len(grad_outputs)
        return float((total - exact).norm() / exact.norm())

    one = error([case.grad_output])
    scales = [1 + i / 64 for i in range(-4, 5) if i]
    many = error([case.grad_output * scale for scale in scales])
    print(f"relative error of one {one:.3f}, of the mean of eight {many:.3f}")
    assert 0.01 < one < 0.3
    assert many < 0.8 * one


def test_an_infinity_makes_the_product_nan() -> None:
    case = make(torch.float32, ((20,), 48, 32), quant=recipe())
    with torch.no_grad():
        case.x[4, 7] = math.inf
    assert torch.isnan(case.layer(case.x)).all()


def test_backend_and_layer_say_simulation() -> None:
    for device in ("cpu", "cuda"):
        backend = choose_gemm_backend(torch.device(device), torch.bfloat16, recipe())
        assert backend.name == "simulation"
        assert backend.reason.startswith("NVFP4 simulation")
    case = make(torch.bfloat16, ((64,), 256, 32), quant=recipe())
    text = repr(case.layer)
    assert "x=e2m1:cur/nv_1x16/fp32" in text
    assert "grad_weight.grad_output=e2m1:cur/nv_1x16/fp32/stochastic/hadamard" in text
    case.layer.quantize_weight()
    assert case.layer.weight_bytes == 2 * case.layer.weight.nbytes + 4  # a BF16 copy: nothing is saved
    x, one = torch.ones(16, 16), torch.ones(())
    with pytest.raises(ValueError, match="must be float8"):  # no other backend takes such payloads
        fp8_gemm(x, x, one, one, power_of_two=False, out_dtype=torch.float32, backend="decode")


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        sink = ListSink()
        case = make(torch.float32, ((40,), 48, 72), quant=recipe(), sink=sink)
        module = nn.Sequential(case.layer, nn.SiLU())
        case.layer.quantize_weight()
        call = torch.compile(module, fullgraph=True) if compiled else module
        x = case.x.detach().clone().requires_grad_()
        output = call(x)
        output.backward(case.grad_output)
        results.append((output.detach(), x.grad, *sink.buffers))
    (eager, *_), (other, *_) = results
    torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))
    # The last bit of SiLU's gradient may differ in compiled code, and with it the random bits of a block:
    # backward is compared as a whole, not code by code.
    for eager, other in zip(results[0][1:], results[1][1:], strict=True):
        assert float((other - eager).norm() / eager.norm()) < 0.2


def test_statistics_of_casts() -> None:
    recorder = CastRecorder(["layer/x", "layer/w", "layer/grad_output"], CPU)
    case = make(torch.float32, ((40,), 48, 72), quant=recipe(), name="layer", recorder=recorder)
    recorder.active = True
    run(case)
    for site, tensor in (("x", case.x), ("w", case.layer.weight), ("grad_output", case.grad_output)):
        found = recorder.collect()[f"layer/{site}"]
        assert found["log2_scale"] == pytest.approx(
            math.log2(2688 / float(tensor.detach().abs().max())), abs=1e-5
        )
        assert found["saturated"] == 0
        assert 12 < found["snr_db"] < 24, site  # 4 bits
