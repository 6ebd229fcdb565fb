"""Operands of torchao's FP8 training, bit for bit: tensor-wise and row-wise scales, powers of two
and FP32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.numerics.cast import quantize
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from tests.training.tiny import tiny_config

pytest.importorskip("torchao", reason="needs torchao: pip install -e .[dev]")

from torchao.float8.config import Float8LinearConfig, ScalingGranularity, ScalingType
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig


def theirs(x: Tensor, fmt: Format, granularity: str, contracted: int, power_of_two: bool) -> Tensor:
    """Values of torchao's operand."""
    quantised = hp_tensor_to_float8_dynamic(
        x,
        dtype_of(fmt),
        LinearMMConfig(),
        scaling_granularity=ScalingGranularity(granularity),
        axiswise_dim=0 if contracted == 0 else -1,
        round_scales_to_power_of_2=power_of_two,
    )
    return quantised._data, quantised._scale


@pytest.mark.parametrize("power_of_two", [True, False], ids=["pow2", "fp32"])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("granularity", "contracted"), [("tensorwise", 1), ("axiswise", 1), ("axiswise", 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_and_scales_are_torchaos(
    dtype: torch.dtype, granularity: str, contracted: int, fmt: Format, power_of_two: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    for exponent in (-20, 0, 9):
        x = torch.randn(48, 80, generator=generator) * torch.exp2(
            torch.randn(48, 80, generator=generator) * 3
        )
        x = (x * 2.0**exponent).to(dtype)
        data, scale = theirs(x, fmt, granularity, contracted, power_of_two)
        ours = "row" if granularity == "axiswise" else "tensor"
        spec = QuantSpec(fmt, granularity=ours, power_of_two=power_of_two)
        payload, scale_inv = quantize(x, spec, contracted=contracted)
        assert torch.equal(payload.view(torch.uint8), data.view(torch.uint8))
        if power_of_two:
            assert torch.equal(scale_inv.reciprocal().reshape(-1), scale.reshape(-1))


@pytest.mark.parametrize(("ours", "name"), [("rowwise", "rowwise"), ("rowwise_gw_hp", "rowwise_with_gw_hp")])
def test_the_recipes_are_torchaos(ours: str, name: str) -> None:
    """Format, granularity and which GEMMs are in FP8, operand by operand."""
    gemm = tiny_config(["precision.gemm.fp8=true", f"precision.recipe={ours}"]).precision.gemm
    quant = gemm.value()
    assert quant is not None
    config = Float8LinearConfig.from_recipe_name(name)
    pairs = [
        (quant.output_x, config.cast_config_input),
        (quant.output_w, config.cast_config_weight),
        (quant.grad_input_grad_output, config.cast_config_grad_output),
        (quant.grad_input_w, config.cast_config_weight_for_grad_input),
        (quant.grad_weight_grad_output, config.cast_config_grad_output_for_grad_weight),
        (quant.grad_weight_x, config.cast_config_input_for_grad_weight),
    ]
    off = [theirs.scaling_type is ScalingType.DISABLED for _, theirs in pairs]
    assert off == [False] * 4 + [not quant.grad_weight_fp8] * 2
    for spec, cast in pairs[: 4 + 2 * quant.grad_weight_fp8]:
        expected = {ScalingGranularity.AXISWISE: "row", ScalingGranularity.TENSORWISE: "tensor"}
        assert spec.granularity == expected[cast.scaling_granularity]
        assert cast.target_dtype in (None, dtype_of(spec.format))
        assert spec.power_of_two == config.round_scales_to_power_of_2
        assert spec.scale_source == "current"
