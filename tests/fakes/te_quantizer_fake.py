"""TE's quantisers for the fake, from the arithmetic of its kernels.

``recipe_common.cuh`` (scale = max / amax in FP32, mantissa cleared for powers of two), ``quantize_mxfp8.cuh``
and ``ptx.cuh`` (E8M0 of amax times the rounded 1 / max, rounded up). Codes are found by search in the table
of all values of the format, ties to the even code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fakes.te_gemm_fake import Float8BlockwiseQTensorStorage, Float8TensorStorage, MXFP8TensorStorage
from tests.fakes.transformer_engine_fake import DType, Recorder, decode

LARGEST = {DType.kFloat8E4M3: 448.0, DType.kFloat8E5M2: 57344.0}
LAST = {DType.kFloat8E4M3: 0x7E, DType.kFloat8E5M2: 0x7B}


def encode(values: Tensor, dtype: DType) -> Tensor:
    """Bytes of FP32 values, to nearest even, saturating; NaN becomes the format's."""
    assert values.dtype == torch.float32
    table = decode(torch.arange(LAST[dtype] + 1, dtype=torch.uint8), dtype)
    magnitude = values.double().abs().nan_to_num(0, posinf=float("inf")).clamp(max=LARGEST[dtype])
    upper = torch.searchsorted(table, magnitude.contiguous()).clamp(max=LAST[dtype])
    lower = (upper - 1).clamp(min=0)
    above, below = table[upper] - magnitude, magnitude - table[lower]
    take_lower = (below < above) | ((below == above) & (lower % 2 == 0))
    code = torch.where(take_lower, lower, upper)
    code = torch.where(values.isnan(), 0x7F, code) + 128 * torch.signbit(values).long()
    return code.to(torch.uint8)


def scale_from_amax(amax: Tensor, dtype: DType, *, power_of_two: bool, epsilon: float) -> Tensor:
    amax = torch.where(amax < epsilon, torch.full_like(amax, epsilon), amax)
    scale = torch.full_like(amax, LARGEST[dtype]) / amax
    scale = torch.where(scale.isinf(), torch.finfo(torch.float32).max, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where(amax.isinf() | (amax == 0) | amax.isnan(), torch.ones_like(scale), scale)


def amax_without_nan(x: Tensor, dim: int | None = None) -> Tensor:
    """As ``fmaxf`` takes it."""
    x = x.float().abs().nan_to_num(0, posinf=float("inf"))
    return x.amax() if dim is None else x.amax(dim, keepdim=True)


def pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


class Quantizer:
    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage, self.internal = rowwise, columnwise, False

    def quantize(self, tensor: Tensor) -> Any:
        assert tensor.is_contiguous() and tensor.dim() == 2, tensor.stride()
        assert tensor.dtype in (torch.bfloat16, torch.float16, torch.float32), tensor.dtype
        assert self.internal, "others are tensors for autograd"
        assert self.rowwise_usage or self.columnwise_usage
        return self._cast(tensor)

    def _cast(self, x: Tensor) -> Any:
        raise NotImplementedError


def fake(recorder: Recorder) -> dict[str, dict[str, Any]]:
    """The part for :func:`tests.fakes.transformer_engine_fake.install`."""

    def one_scale(quantizer: Any, x: Tensor, scale: Tensor) -> Float8TensorStorage:
        codes = encode(x.float() * scale, quantizer.dtype)
        anywhere = recorder.capability >= (10, 0)  # which multiplies in any layout
        return Float8TensorStorage(
            data=codes if quantizer.rowwise_usage or anywhere else None,
            fp8_scale_inv=1 / scale,
            fp8_dtype=quantizer.dtype,
            data_transpose=codes.t().contiguous() if quantizer.columnwise_usage and not anywhere else None,
        )

    class Float8Quantizer(Quantizer):
        def __init__(
            self, scale: Tensor, amax: Tensor, fp8_dtype: DType, *, rowwise: bool, columnwise: bool
        ) -> None:
            super().__init__(rowwise=rowwise, columnwise=columnwise)
            self.scale, self.amax, self.dtype = scale, amax, fp8_dtype

        def _cast(self, x: Tensor) -> Float8TensorStorage:
            recorder.note("Float8Quantizer", rows=self.rowwise_usage, columns=self.columnwise_usage)
            for number in (self.scale, self.amax):
                assert number.dtype == torch.float32 and number.shape == (1,), number
            assert bool(self.scale > 0), "a scale of 0 loses everything"
            torch.maximum(self.amax, amax_without_nan(x), out=self.amax)
            return one_scale(self, x, self.scale)

    class Float8CurrentScalingQuantizer(Quantizer):
        def __init__(
            self,
            fp8_dtype: DType,
            device: torch.device,
            *,
            rowwise: bool,
            columnwise: bool,
            force_pow_2_scales: bool,
            amax_epsilon: float,
        ) -> None:
            super().__init__(rowwise=rowwise, columnwise=columnwise)
            self.dtype, self.power_of_two, self.epsilon = fp8_dtype, force_pow_2_scales, amax_epsilon

        def _cast(self, x: Tensor) -> Float8TensorStorage:
            recorder.note(
                "Float8CurrentScalingQuantizer", rows=self.rowwise_usage, columns=self.columnwise_usage
            )
            amax = amax_without_nan(x).view(1)
            scale = scale_from_amax(amax, self.dtype, power_of_two=self.power_of_two, epsilon=self.epsilon)
            return one_scale(self, x, scale)

    class Float8BlockQuantizer(Quantizer):
        def __init__(
            self,
            fp8_dtype: DType,
            *,
            rowwise: bool,
            columnwise: bool,
            amax_epsilon: float,
            force_pow_2_scales: bool,
            block_scaling_dim: int,
        ) -> None:
            super().__init__(rowwise=rowwise, columnwise=columnwise)
            assert block_scaling_dim in (1, 2)
            self.dtype, self.power_of_two, self.epsilon = fp8_dtype, force_pow_2_scales, amax_epsilon
            self.square = block_scaling_dim == 2

        def _one_way(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """Codes of x [R, K] and their scales in TE's shape, for a GEMM that contracts K."""
            rows, columns = x.shape
            assert rows % 128 == 0 and columns % 128 == 0, "not quantizable"
            height = 128 if self.square else 1
            tiles = x.float().view(rows // height, height, columns // 128, 128)
            amax = tiles.abs().nan_to_num(0, posinf=float("inf")).amax((1, 3), keepdim=True)
            scale = scale_from_amax(amax, self.dtype, power_of_two=self.power_of_two, epsilon=self.epsilon)
            codes = encode((tiles * scale).reshape(rows, columns), self.dtype)
            inverse = (1 / scale)[:, 0, :, 0]
            return codes, pad(inverse if self.square else inverse.t(), 1, 4).contiguous()

        def _cast(self, x: Tensor) -> Float8BlockwiseQTensorStorage:
            recorder.note("Float8BlockQuantizer", rows=self.rowwise_usage, columns=self.columnwise_usage)
            nothing = None, None
            straight = self._one_way(x) if self.rowwise_usage else nothing
            turned = self._one_way(x.t()) if self.columnwise_usage else nothing
            return Float8BlockwiseQTensorStorage(
                *straight, *turned, self.dtype, None, is_2D_scaled=self.square
            )

    class MXFP8Quantizer(Quantizer):
        def __init__(self, fp8_dtype: DType, *, rowwise: bool, columnwise: bool) -> None:
            super().__init__(rowwise=rowwise, columnwise=columnwise)
            self.dtype = fp8_dtype

        def _one_way(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """Codes and E8M0 scales [R, K / 32] of x [R, K]."""
            rows, columns = x.shape
            assert rows % 32 == 0 and columns % 32 == 0, "not quantizable"
            blocks = x.float().view(rows, columns // 32, 32)
            value = amax_without_nan(blocks, 2) * (torch.ones(()) / LARGEST[self.dtype])
            bits = value.view(torch.int32)
            exponent, mantissa = bits >> 23, bits & 0x7FFFFF
            up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
            exponent = torch.where(value.isinf(), 0xFE, exponent + up.int())
            factor = torch.exp2(127.0 - exponent.double()).float()
            codes = encode((blocks * factor).reshape(rows, columns), self.dtype)
            return codes, exponent[:, :, 0].to(torch.uint8)

        def _cast(self, x: Tensor) -> MXFP8TensorStorage:
            recorder.note("MXFP8Quantizer", rows=self.rowwise_usage, columns=self.columnwise_usage)
            straight: tuple[Any, Any] = None, None
            turned: tuple[Any, Any] = None, None
            if self.rowwise_usage:
                codes, scales = self._one_way(x)
                straight = codes, pad(scales, 128, 4).contiguous()
            if self.columnwise_usage:
                codes, scales = self._one_way(x.t())
                turned = codes.t().contiguous(), pad(scales.t(), 4, 128).contiguous()
            return MXFP8TensorStorage(*straight, *turned, self.dtype, None, with_gemm_swizzled_scales=False)

    quantizers = (Float8Quantizer, Float8CurrentScalingQuantizer, Float8BlockQuantizer, MXFP8Quantizer)
    return {"pytorch.tensor": {kind.__name__: kind for kind in quantizers}}
