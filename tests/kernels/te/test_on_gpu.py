"""The real Transformer Engine on a real GPU, against our own casts and products. Not run yet."""

from __future__ import annotations

import pytest
import torch

from fp8train.extensions.catalogue import TRANSFORMER_ENGINE, find
from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.scaling import cuda_version
from fp8train.kernels.te import gemm as te_gemm
from fp8train.kernels.te import native
from fp8train.kernels.te.quantize import TeCaster
from fp8train.layers.fp8_operand import quantize_kept, quantize_layouts
from fp8train.numerics.scale_state import ScaleSlot
from fp8train.precision.number_formats import E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.transformer_engine import NativeRecipe, mismatch
from tests.kernels.te.test_gemm import BLOCKS, MX, TENSOR, operand, wide
from tests.kernels.te.test_quantize import assert_same, source

_LACKING = find(TRANSFORMER_ENGINE).lacking
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_LACKING is not None, reason=f"Transformer Engine {_LACKING}"),
]


@pytest.mark.parametrize("kinds", [TENSOR, *BLOCKS, MX], ids=str)
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=["44", "54", "45"])
@pytest.mark.parametrize("shape", [(128, 256, 256), (208, 384, 336)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products(kinds: tuple, formats: tuple, shape: tuple, dtype: torch.dtype) -> None:
    capability = torch.cuda.get_device_capability()
    if not te_gemm.multiplies(kinds, capability, cuda_version(), dtype, power_of_two=True):
        pytest.skip(f"Transformer Engine does not multiply {kinds} on {capability}")
    m, k, n = shape
    a, b = operand(m, k, kinds[0], 1, 1, fmt=formats[0]), operand(k, n, kinds[1], 0, 2, fmt=formats[1])
    on_gpu = [tensor.cuda() for tensor in (a[0], b[0], a[1], b[1])]
    for alpha in (1.0, 0.3):
        got = fp8_gemm(*on_gpu, alpha=alpha, power_of_two=True, out_dtype=dtype, backend="te").cpu()
        expected, magnitude = alpha * (wide(a) @ wide(b)), alpha * (wide(a).abs() @ wide(b).abs())
        unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
        assert ((got.double() - expected).abs() <= unit * expected.abs() + k * 2.0**-22 * magnitude).all()


SPECS = [
    *(
        QuantSpec(fmt, granularity=kind, power_of_two=pow2)
        for fmt in (E4M3, E5M2)
        for kind in ("tensor", "block_1x128", "block_128x128")
        for pow2 in (True, False)
    ),
    QuantSpec(E4M3, granularity="mx_1x32"),
    QuantSpec(E4M3, scale_source="constant", constant_exponent=-18),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casts(spec: QuantSpec, dtype: torch.dtype) -> None:
    least = {"tensor": (8, 9), "mx_1x32": (10, 0)}.get(spec.granularity, (9, 0))
    if torch.cuda.get_device_capability() < least:
        pytest.skip(f"needs compute capability {least}")
    assert mismatch(spec) is None
    x, nobody = source(256, 384, dtype).cuda(), (None, None)
    keep = "second_copy" if spec.directed else "same"
    both = quantize_kept(x, keep, (spec, spec), nobody, None, nobody, caster=TeCaster())
    assert_same(both, quantize_kept(x, keep, (spec, spec), nobody, None, nobody))


def test_delayed_casts() -> None:
    x, spec = source(256, 384, torch.bfloat16).cuda(), QuantSpec(E4M3, scale_source="delayed")
    slots = [ScaleSlot(torch.tensor(2.0**-16).cuda(), torch.zeros(()).cuda()) for _ in range(2)]
    ours = quantize_layouts(x, spec, slots[0], contracted=1)
    assert_same(quantize_layouts(x, spec, slots[1], contracted=1, caster=TeCaster()), ours)
    assert slots[0].amax == slots[1].amax


def test_a_native_linear() -> None:
    """Close to the product in FP32, and its gradients arrive."""
    taken: list[torch.Tensor] = []
    weight = torch.nn.Parameter(torch.randn(256, 128, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    recipe = native.make_recipe(NativeRecipe("Float8CurrentScaling", {"fp8_format": "HYBRID"}))
    linear = native.NativeLinear(weight, taken.append)
    with native.autocast(recipe):
        y = linear(x, weight)
    y.sum().backward()
    exact = x.detach().float() @ weight.detach().float().t()
    assert (y.float() - exact).norm() < 0.06 * exact.norm()
    assert len(taken) == 1 and taken[0].shape == weight.shape and x.grad is not None
