"""TE's storages and ``general_gemm`` for the fake: BLAS layouts, two-dimensional scales, float64.

Rules are those of TE 2.20's ``cpp_extensions/gemm.py``, ``extensions/gemm.cpp``, ``cublaslt_gemm.cu`` and
``transformer_engine.cpp`` (shapes of scales), in the order in which they are met there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.fakes.transformer_engine_fake import DType, Recorder, decode


def _bytes(data: Tensor) -> Tensor:
    assert data.dtype == torch.uint8, f"FP8 data is handed over as bytes, got {data.dtype}"
    assert data.dim() == 2 and data.is_contiguous(), f"strides {data.stride()} of {tuple(data.shape)}"
    return data


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Float8TensorStorage:
    def __init__(
        self,
        *,
        data: Tensor | None,
        fp8_scale_inv: Tensor,
        fp8_dtype: DType,
        data_transpose: Tensor | None = None,
        quantizer: Any = None,
    ) -> None:
        assert isinstance(fp8_dtype, DType)
        assert fp8_scale_inv.dtype == torch.float32 and fp8_scale_inv.shape == (1,), fp8_scale_inv
        self._data, self._transpose, self._scale_inv = data, data_transpose, fp8_scale_inv
        self._fp8_dtype, self._quantizer = fp8_dtype, quantizer
        self._transpose_invalid = data_transpose is None

    def rowwise(self) -> tuple[Tensor, Tensor]:
        """Values without scales, and scales of the same shape."""
        assert self._data is not None, "missing row-wise usage"
        values = decode(_bytes(self._data), self._fp8_dtype)
        return values, self._scale_inv.double().expand(values.shape)

    def columnwise(self, recorder: Recorder) -> tuple[Tensor, Tensor]:
        """The same, of the matrix whose transpose is contracted."""
        if recorder.capability >= (10, 0) and self._data is not None:
            return self.rowwise()
        assert self._transpose is not None and not self._transpose_invalid, "missing column-wise usage"
        values = decode(_bytes(self._transpose), self._fp8_dtype).t()
        return values, self._scale_inv.double().expand(values.shape)


class _TwoWays:
    """What the storages of scale blocks have in common."""

    def __init__(
        self,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        fp8_dtype: DType,
        quantizer: Any,
    ) -> None:
        assert isinstance(fp8_dtype, DType)
        self._rowwise_data, self._rowwise_scale_inv = rowwise_data, rowwise_scale_inv
        self._columnwise_data, self._columnwise_scale_inv = columnwise_data, columnwise_scale_inv
        self._fp8_dtype, self._quantizer = fp8_dtype, quantizer


class Float8BlockwiseQTensorStorage(_TwoWays):
    def __init__(self, *args: Any, is_2D_scaled: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_2D_scaled = is_2D_scaled

    def _read(self, data: Tensor | None, scales: Tensor | None, recorder: Recorder) -> tuple[Tensor, Tensor]:
        assert data is not None and scales is not None, "missing usage"
        values = decode(_bytes(data), self._fp8_dtype)
        rows, columns = values.shape
        assert scales.dtype == torch.float32 and scales.is_contiguous(), (scales.dtype, scales.stride())
        if recorder.capability >= (10, 0):
            finite = scales[torch.isfinite(scales) & (scales > 0)]
            assert torch.equal(torch.exp2(torch.log2(finite).round()), finite), "MXFP8 needs powers of two"
        blocks = -(-columns // 128)
        if self._is_2D_scaled:
            assert scales.shape == (-(-rows // 128), _padded(blocks, 4)), tuple(scales.shape)
            spread = scales[:, :blocks].repeat_interleave(128, 0)[:rows]
        else:
            assert scales.shape == (blocks, _padded(rows, 4)), tuple(scales.shape)
            spread = scales[:, :rows].t()
        return values, spread.repeat_interleave(128, 1)[:, :columns].double()

    def rowwise(self, recorder: Recorder) -> tuple[Tensor, Tensor]:
        return self._read(self._rowwise_data, self._rowwise_scale_inv, recorder)

    def columnwise(self, recorder: Recorder) -> tuple[Tensor, Tensor]:
        values, scales = self._read(self._columnwise_data, self._columnwise_scale_inv, recorder)
        return values.t(), scales.t()


def unswizzled(scales: Tensor) -> Tensor:
    """Plain order of E8M0 scales from that of the tensor cores: of each tile of 128 x 4, byte
    16 (row mod 32) + 4 (row div 32) + column."""
    rows, columns = scales.shape
    plain = torch.empty_like(scales)
    flat = scales.reshape(-1)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * (columns // 4) + column // 4
            within = 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
            plain[row, column] = flat[512 * tile + within]
    return plain


class MXFP8TensorStorage(_TwoWays):
    def __init__(self, *args: Any, with_gemm_swizzled_scales: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._with_gemm_swizzled_scales = with_gemm_swizzled_scales

    def rowwise(self, recorder: Recorder) -> tuple[Tensor, Tensor]:
        assert self._rowwise_data is not None and self._rowwise_scale_inv is not None, (
            "missing row-wise usage"
        )
        values, scales = decode(_bytes(self._rowwise_data), self._fp8_dtype), self._rowwise_scale_inv
        rows, columns = values.shape
        assert scales.dtype == torch.uint8 and scales.is_contiguous(), scales.dtype
        assert scales.shape == (_padded(rows, 128), _padded(-(-columns // 32), 4)), tuple(scales.shape)
        plain = unswizzled(scales) if self._with_gemm_swizzled_scales else scales
        exponents = plain[:rows, : -(-columns // 32)].double()
        factors = torch.where(exponents == 255, torch.nan, torch.exp2(exponents - 127))
        return values, factors.repeat_interleave(32, 1)[:, :columns]

    def columnwise(self, recorder: Recorder) -> tuple[Tensor, Tensor]:
        raise AssertionError("column-wise MXFP8 is not among what we use")


Storage = Float8TensorStorage | Float8BlockwiseQTensorStorage | MXFP8TensorStorage


def _read(operand: Storage, *, rowwise: bool, recorder: Recorder) -> tuple[Tensor, Tensor]:
    if isinstance(operand, Float8TensorStorage):
        return operand.rowwise() if rowwise else operand.columnwise(recorder)
    return operand.rowwise(recorder) if rowwise else operand.columnwise(recorder)


def _check_pair(A: Storage, B: Storage, recorder: Recorder) -> None:
    assert type(A) is type(B), f"A and B scale in other ways: {type(A).__name__}, {type(B).__name__}"
    assert A._fp8_dtype != DType.kFloat8E5M2 or B._fp8_dtype != DType.kFloat8E5M2, "E5M2 by E5M2"
    if isinstance(A, Float8BlockwiseQTensorStorage) and isinstance(B, Float8BlockwiseQTensorStorage):
        assert recorder.capability >= (9, 0), "block scaling needs Hopper"
        assert not (A._is_2D_scaled and B._is_2D_scaled), "only 1D by 1D, 1D by 2D, and 2D by 1D"
    if isinstance(A, MXFP8TensorStorage):
        assert (10, 0) <= recorder.capability < (12, 0), "MXFP8 needs Blackwell"


def fake(recorder: Recorder) -> dict[str, dict[str, Any]]:
    """The part for :func:`tests.fakes.transformer_engine_fake.install`."""

    def general_gemm(
        A: Storage,
        B: Storage,
        out_dtype: torch.dtype | None = None,
        quantization_params: Any = None,
        gelu: bool = False,
        gelu_in: Tensor | None = None,
        alpha: float = 1.0,
        beta: float | None = None,
        accumulate: bool = False,
        layout: str = "TN",
        out: Tensor | None = None,
        bias: Tensor | None = None,
        use_split_accumulator: bool = False,
    ) -> tuple[Tensor, None, None, None]:
        assert layout in ("TN", "NN", "NT"), layout
        assert not accumulate and out is None and bias is None and not gelu, "not among what we use"
        assert out_dtype in (torch.bfloat16, torch.float16, torch.float32), out_dtype
        assert isinstance(alpha, float)
        recorder.note("general_gemm", kind=type(A), alpha=alpha, split=use_split_accumulator, layout=layout)
        _check_pair(A, B, recorder)
        first, first_scales = _read(A, rowwise=layout[0] == "T", recorder=recorder)
        second, second_scales = _read(B, rowwise=layout[1] == "N", recorder=recorder)
        left, right = second * second_scales, first * first_scales
        left, right = left if layout[1] == "N" else left.t(), right.t() if layout[0] == "T" else right
        assert left.shape[1] == right.shape[0], f"{tuple(left.shape)} by {tuple(right.shape)}"
        assert left.shape[1] % 16 == 0, "leading dimension: caller must pad"
        if isinstance(A, Float8BlockwiseQTensorStorage) and isinstance(B, Float8BlockwiseQTensorStorage):
            assert right.shape[1] % 8 == 0, "outer dimension of A: caller must pad"
            assert B._is_2D_scaled or left.shape[0] % 8 == 0, "outer dimension of B: caller must pad"
        return (alpha * (left @ right)).to(out_dtype), None, None, None

    return {
        "pytorch.cpp_extensions": {"general_gemm": general_gemm},
        "pytorch.tensor": {
            "Float8TensorStorage": Float8TensorStorage,
            "Float8BlockwiseQTensorStorage": Float8BlockwiseQTensorStorage,
            "MXFP8TensorStorage": MXFP8TensorStorage,
        },
    }
