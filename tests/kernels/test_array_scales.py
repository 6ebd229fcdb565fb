"""GEMMs with scales of rows and blocks, against the float64 product of the dequantised operands.

The bound is that of ``test_gemm``; scales that are not powers of two add one rounding of each operand's
elements, 2^-24 each.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8train.kernels import gemm, gemm_choice
from fp8train.kernels.decode import array_folds
from fp8train.kernels.gemm import fp8_gemm, scaled_mm
from fp8train.kernels.gemm_choice import choose_gemm_backend, gemms_by_kernel
from fp8train.kernels.scaling import (
    block_scales,
    fits_kernel,
    granularity_of,
    mx_scales,
    native_pair,
    shape_rule,
)
from fp8train.numerics.cast import quantize
from fp8train.numerics.granularity import expand_scales
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E4M3
from fp8train.precision.operand_cast import QuantSpec
from tests.kernels.test_gemm import UNIT_ROUNDOFF, assert_within

pytestmark = pytest.mark.usefixtures("each_cpu")

PAIRS = [
    ("row", "row"),
    ("row", "tensor"),
    ("tensor", "row"),
    ("block_1x128", "block_1x128"),
    ("block_1x128", "block_128x128"),
    ("block_128x128", "block_1x128"),
    ("mx_1x32", "mx_1x32"),
    ("mx_1x32", "block_128x128"),
]
SHAPES = [(16, 32, 16), (48, 272, 144), (33, 400, 160)]


def operand(rows: int, columns: int, granularity: str, contracted: int, seed: int, pow2: bool) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 12, (rows, 1), generator=generator).float())
    x = x * torch.exp2(torch.randint(-12, 12, (1, columns), generator=generator).float())
    spec = QuantSpec(E4M3, granularity=granularity, power_of_two=pow2)
    return quantize(x, spec, contracted=contracted)


def wide(payload: Tensor, scale_inv: Tensor) -> Tensor:
    return payload.double() * expand_scales(scale_inv, payload.shape).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("kind_a", "kind_b"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(dtype: torch.dtype, kind_a: str, kind_b: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    for pow2 in (True, False) if "mx_1x32" not in (kind_a, kind_b) else (True,):
        a, b = operand(m, k, kind_a, 1, 1, pow2), operand(k, n, kind_b, 0, 2, pow2)
        for alpha in (1.0, 0.3):
            got = fp8_gemm(
                a[0], b[0], a[1], b[1], alpha=alpha, power_of_two=pow2, out_dtype=dtype, backend="decode"
            )
            expected = alpha * (wide(*a) @ wide(*b))
            magnitude = alpha * (wide(*a).abs() @ wide(*b).abs())
            unit = UNIT_ROUNDOFF[dtype]
            assert_within(got, expected, (k + 8) * min(unit, 2.0**-24) * magnitude + unit * expected.abs())


@pytest.mark.parametrize("exponent", [-70, 0, 60])
def test_scales_out_of_bf16s_safe_range(exponent: int) -> None:
    """Powers of two so small that products of scaled operands would underflow, or so large they overflow."""
    a, b = operand(16, 32, "row", 1, 1, True), operand(32, 16, "row", 0, 2, True)
    scale_a, scale_b = a[1] * 2.0**exponent, b[1] * 2.0**-exponent
    got = fp8_gemm(
        a[0], b[0], scale_a, scale_b, power_of_two=True, out_dtype=torch.bfloat16, backend="decode"
    )
    expected, magnitude = wide(*a) @ wide(*b), wide(*a).abs() @ wide(*b).abs()
    assert_within(got, expected, 40 * 2.0**-24 * magnitude + 2.0**-8 * expected.abs())


def test_what_is_folded() -> None:
    """With both operands scaled, the smallest product must still be a normal number."""
    folded = [exponent for exponent in range(-120, 120) if array_folds(torch.tensor([1.0, 2.0**exponent]))]
    assert folded == list(range(-50, 41))
    assert 2.0**-9 * 2.0**-16 * 2.0 ** (2 * folded[0]) >= 2.0**-126
    assert not array_folds(torch.tensor([2.0**-51, 2.0**41]))


@pytest.mark.parametrize("exponent", [-53, -52, -51, -50, -49, 39, 40, 41, 44])
@pytest.mark.parametrize("arrays", [(True, True), (True, False), (False, True)])
def test_the_smallest_and_the_largest_product(exponent: int, arrays: tuple[bool, bool]) -> None:
    """One product of the smallest E5M2 and E4M3 values, and one of the largest, exact on either side of every
    edge; BF16 instructions would flush what is below 2^-126."""
    for first, second in ((2.0**-16, 2.0**-9), (57344.0, 448.0)):
        a, b = torch.zeros(16, 16), torch.zeros(16, 32)
        a[0, 0], b[0, 0] = first, second
        shapes = [shape if array else () for shape, array in zip(((16, 1), (1, 32)), arrays, strict=True)]
        scales = [torch.full(shape, 2.0**exponent) for shape in shapes]
        got = fp8_gemm(
            *(a.to(torch.float8_e5m2), b.to(torch.float8_e4m3fn), *scales),
            power_of_two=True,
            out_dtype=torch.bfloat16,
            backend="decode",
        )
        assert float(got[0, 0]) == first * second * 2.0 ** (2 * exponent)
        assert not got.flatten()[1:].any()


def test_a_nan_scale_spoils_its_row_only() -> None:
    a, b = operand(16, 32, "row", 1, 1, True), operand(32, 16, "row", 0, 2, True)
    clean = fp8_gemm(*(a[0], b[0], a[1], b[1]), power_of_two=True, out_dtype=torch.float32, backend="decode")
    scale = a[1].clone()
    scale[3] = math.nan
    got = fp8_gemm(*(a[0], b[0], scale, b[1]), power_of_two=True, out_dtype=torch.float32, backend="decode")
    assert torch.isnan(got[3]).all()
    others = [row for row in range(16) if row != 3]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize(("kind_a", "kind_b"), [("row", "row"), ("row", "tensor"), ("tensor", "row")])
def test_torchs_row_kernel_agrees_with_decode(kind_a: str, kind_b: str) -> None:
    """The path of a GPU, on the CPU's implementation of the same operator."""
    a, b = operand(48, 64, kind_a, 1, 1, True), operand(64, 32, kind_b, 0, 2, True)
    for alpha in (1.0, 0.3):
        got = fp8_gemm(
            a[0],
            b[0],
            a[1],
            b[1],
            alpha=alpha,
            power_of_two=True,
            out_dtype=torch.float32,
            backend="scaled_mm",
        )
        expected = alpha * (wide(*a) @ wide(*b))
        magnitude = wide(*a).abs() @ wide(*b).abs()
        assert_within(got, expected, 72 * 2.0**-24 * magnitude)
    column_major = b[0].t().contiguous().t()
    direct = scaled_mm(a[0], column_major, a[1], b[1], out_dtype=torch.float32)
    assert_within(direct, wide(*a) @ wide(*b), 72 * 2.0**-24 * magnitude)


def test_transposed_scales_of_rows_are_taken() -> None:
    """As grad_weight's are: a view [M, 1] of [1, M], contiguous with the strides (1, M)."""
    a, b = operand(64, 48, "row", 0, 1, True), operand(64, 32, "row", 0, 2, True)
    scale_a = a[1].t()
    assert scale_a.stride() == (1, 48)
    column_major = b[0].t().contiguous().t()
    got = scaled_mm(a[0].t().contiguous(), column_major, scale_a, b[1], out_dtype=torch.float32)
    magnitude = wide(*a).abs().t() @ wide(*b).abs()
    assert_within(got, wide(*a).t() @ wide(*b), 72 * 2.0**-24 * magnitude)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind_a", "kind_b"), [pair for pair in PAIRS if pair != ("mx_1x32", "block_128x128")]
)
def test_torch_accepts_scales_as_they_are_laid_out(kind_a: str, kind_b: str, out_dtype: torch.dtype) -> None:
    """torch checks shapes and strides on the meta device too; those of casts, and of views of them."""
    for m, k, n in ((128, 256, 384), (256, 640, 128)):
        assert fits_kernel(kind_a, kind_b, m, k, n)
        a, b = operand(m, k, kind_a, 1, 1, True), operand(k, n, kind_b, 0, 2, True)
        turned = operand(k, m, kind_a, 0, 1, True)
        for payload, scales in (a, (turned[0].t(), turned[1].t())):
            got = scaled_mm(
                torch.empty_like(payload, device="meta", memory_format=torch.contiguous_format),
                b[0].t().contiguous().t().to("meta"),
                scales.to("meta"),
                b[1].to("meta"),
                out_dtype=out_dtype,
            )
            assert (got.shape, got.dtype) == ((m, n), out_dtype)


def test_torch_refuses_what_is_decoded_here() -> None:
    a, b = operand(48, 640, "block_1x128", 1, 1, True), operand(640, 80, "block_128x128", 0, 2, True)
    with pytest.raises(RuntimeError, match="blockwise scaling"):
        scaled_mm(
            a[0].to("meta"),
            b[0].t().contiguous().t().to("meta"),
            a[1].to("meta"),
            b[1].to("meta"),
            out_dtype=torch.bfloat16,
        )
    assert not fits_kernel("block_1x128", "block_128x128", 48, 640, 80)


def test_pairs_without_a_kernel_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has no block kernels either: ``scaled_mm`` is not called for them."""

    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("no such kernel")

    monkeypatch.setattr(gemm, "scaled_mm", refuse)
    a, b = operand(48, 256, "block_1x128", 1, 1, True), operand(256, 32, "block_1x128", 0, 2, True)
    arguments = (a[0], b[0], a[1], b[1])
    got, decoded = (
        fp8_gemm(*arguments, power_of_two=True, out_dtype=torch.float32, backend=backend)
        for backend in ("scaled_mm", "decode")
    )
    assert torch.equal(got, decoded)
    row, other = operand(48, 256, "row", 1, 1, True), operand(256, 32, "row", 0, 2, True)
    with pytest.raises(AssertionError, match="no such kernel"):
        fp8_gemm(
            *(row[0], other[0], row[1], other[1]),
            power_of_two=True,
            out_dtype=torch.float32,
            backend="scaled_mm",
        )


def test_shapes_tell_granularities() -> None:
    for name in ("row", "block_1x128", "block_128x128", "mx_1x32"):
        for contracted in (0, 1):
            payload, scale_inv = operand(272, 400, name, contracted, 1, True)
            assert granularity_of(scale_inv, payload.shape, contracted) == name
    assert granularity_of(torch.ones(()), torch.Size((16, 16)), 1) == "tensor"
    payload, scale_inv = operand(48, 128, "block_1x128", 1, 1, True)
    assert granularity_of(scale_inv, payload.shape, 1) == "row"  # one block per row


def test_kernels_of_devices() -> None:
    hopper, blackwell, ada, bf16 = (9, 0), (10, 0), (8, 9), torch.bfloat16
    for capability in (hopper, blackwell, ada):
        assert native_pair("row", "tensor", capability, (12, 8), bf16)
        assert native_pair("tensor", "tensor", capability, (12, 8), torch.float32, torch.float8_e5m2)
        assert not native_pair("row", "block_1x128", capability, (12, 9), bf16)
    assert native_pair("block_1x128", "block_128x128", hopper, (12, 9), bf16)
    assert not native_pair("block_1x128", "block_128x128", hopper, (12, 8), bf16)
    assert not native_pair("block_1x128", "block_128x128", blackwell, (13, 0), bf16)
    assert not native_pair("block_128x128", "block_128x128", hopper, (13, 0), bf16)
    assert native_pair("mx_1x32", "mx_1x32", blackwell, (12, 8), bf16)
    assert not native_pair("mx_1x32", "mx_1x32", hopper, (13, 0), bf16)


@pytest.mark.parametrize(("a", "b"), [("row", "row"), ("row", "tensor"), ("tensor", "row")])
def test_only_cublas_gives_rows_in_fp32_or_takes_b_in_e5m2(a: str, b: str) -> None:
    for odd in ((torch.float32, torch.float8_e4m3fn), (torch.bfloat16, torch.float8_e5m2)):
        assert native_pair(a, b, (9, 0), (12, 9), *odd)
        assert native_pair(a, b, (9, 0), (13, 0), *odd)
        for capability, cuda in (((9, 0), (12, 8)), ((8, 9), (13, 0)), ((10, 0), (13, 0))):
            assert not native_pair(a, b, capability, cuda, *odd)


def test_shapes_of_block_kernels() -> None:
    blocks = ("block_1x128", "block_128x128")
    assert fits_kernel(*blocks, 48, 256, 384)
    assert not fits_kernel(*blocks, 48, 272, 384)  # a short block along K
    assert not fits_kernel(*blocks, 48, 256, 80)  # along N
    assert not fits_kernel(*blocks, 50, 256, 384)
    assert not fits_kernel("block_128x128", "block_1x128", 48, 256, 80)
    assert fits_kernel("block_1x128", "block_1x128", 48, 256, 80)
    assert fits_kernel("mx_1x32", "mx_1x32", 50, 96, 80)
    assert not fits_kernel("mx_1x32", "mx_1x32", 48, 80, 80)
    assert fits_kernel("row", "tensor", 50, 80, 80)
    assert shape_rule([("row", "row"), ("tensor", "tensor")]) == ""
    assert shape_rule([("mx_1x32", "mx_1x32")]) == "K a multiple of 32"


def mx_quant() -> LinearQuant:
    spec = QuantSpec(E4M3, granularity="mx_1x32")
    return LinearQuant(spec, spec, spec, spec, spec, spec, "second_copy", "second_copy")


def test_the_reason_says_which_gemms_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backend = choose_gemm_backend(torch.device("cuda"), torch.bfloat16, mx_quant())
    assert backend.name == "scaled_mm"
    assert (
        "no kernel here for output (mx_1x32 x mx_1x32), grad_input (mx_1x32 x mx_1x32), grad_weight "
        "(mx_1x32 x mx_1x32): operands decoded, multiplied in high precision" in backend.reason
    )
    native, decoded = gemms_by_kernel(mx_quant(), (10, 0), (12, 8), torch.bfloat16)
    assert list(native) == ["output", "grad_input", "grad_weight"] and not decoded
    plain = choose_gemm_backend(torch.device("cuda"), torch.bfloat16, LinearQuant())
    assert "decoded" not in plain.reason


def test_the_reason_tells_results_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have FP32 results on a Hopper with CUDA 12.9 only; blocks have kernels for some shapes only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm_choice, "cuda_version", lambda: (12, 8))
    row, block, square = (
        QuantSpec(E4M3, granularity) for granularity in ("row", "block_1x128", "block_128x128")
    )
    cuda, rows = torch.device("cuda"), LinearQuant(row, row, row, row, row, row, "second_copy", "second_copy")
    in_fp32 = "grad_weight (row x row) with results in torch.float32: operands decoded"
    for dtype, said in ((torch.bfloat16, ""), (torch.float32, in_fp32)):
        reason = choose_gemm_backend(cuda, dtype, rows).reason
        assert said in reason and ("decoded" in reason) == bool(said)
    monkeypatch.setattr(gemm_choice, "cuda_version", lambda: (12, 9))
    assert "decoded" not in choose_gemm_backend(cuda, torch.float32, rows).reason
    blocks = LinearQuant(block, square, block, square, block, block, "second_copy", "same")
    assert choose_gemm_backend(cuda, torch.bfloat16, blocks).reason.endswith(
        "; kernels of output, grad_input, grad_weight take K a multiple of 128, 1x128 operands with a "
        "multiple of 4 rows, 128x128 operands of whole blocks: operands of other shapes decoded, likewise"
    )


@pytest.mark.parametrize(
    ("capability", "n", "out_dtype", "kernel"),
    [
        ((9, 0), 128, torch.bfloat16, True),
        ((9, 0), 80, torch.bfloat16, False),
        ((10, 0), 128, torch.bfloat16, False),
    ],
)
def test_a_shape_without_a_kernel_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    n: int,
    out_dtype: torch.dtype,
    kernel: bool,
) -> None:
    """M = 48, N = 80 included. The device is told by a tensor without memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(gemm, "cuda_version", lambda: (12, 9))
    a, b = operand(48, 256, "block_1x128", 1, 1, True), operand(256, n, "block_128x128", 0, 2, True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake_a = torch.empty(a[0].shape, dtype=a[0].dtype, device="cuda")
        fake_b = torch.empty(b[0].shape, dtype=b[0].dtype, device="cuda")
        assert gemm._has_kernel(fake_a, fake_b, a[1], b[1], out_dtype) == kernel


def test_block_scales_have_the_kernels_shapes_and_strides() -> None:
    """Rules of torch's ScaledBlas.cpp, stated in the module."""
    scales = torch.rand(48, 3)
    laid = block_scales(scales, "block_1x128")
    assert (laid.shape, laid.stride()) == ((48, 3), (1, 48))
    assert torch.equal(laid, scales)
    square = torch.rand(2, 5)
    laid = block_scales(square, "block_128x128")
    assert (laid.shape, laid.stride()) == ((8, 2), (1, 8))
    assert torch.equal(laid[:5], square.t())


def test_mx_scales_are_in_the_tensor_cores_order() -> None:
    """Byte by byte, by cuBLAS's formula for a tile of 128 x 4."""
    rows, columns = 160, 6
    exponents = torch.randint(-100, 100, (rows, columns), generator=torch.Generator().manual_seed(0))
    scales = torch.exp2(exponents.float())
    scales[7, 3] = math.nan
    flat = mx_scales(scales).view(torch.uint8)
    assert flat.numel() == 256 * 8
    expected = torch.zeros(256 * 8, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * 2 + column // 4
            r, c = row % 128, column % 4
            value = 255 if (row, column) == (7, 3) else int(exponents[row, column]) + 127
            expected[tile * 512 + (r % 32) * 16 + (r // 32) * 4 + c] = value
    assert torch.equal(flat, expected)
    assert torch.equal(mx_scales(scales[:, :4])[:1].float(), scales[0, :1])  # E8M0 as torch reads it


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(48, 256, 80), (128, 256, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind_a", "kind_b"), PAIRS)
def test_on_a_gpu(kind_a: str, kind_b: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Whatever runs there: decoded operands, or a kernel, which a block needs whole blocks for. The bound is
    that of an FP22 accumulator and of the result's rounding."""
    m, k, n = shape
    a, b = operand(m, k, kind_a, 1, 1, True), operand(k, n, kind_b, 0, 2, True)
    arguments = [tensor.cuda() for tensor in (a[0], b[0], a[1], b[1])]
    got = fp8_gemm(*arguments, power_of_two=True, out_dtype=dtype, backend="scaled_mm").cpu()
    expected, magnitude = wide(*a) @ wide(*b), wide(*a).abs() @ wide(*b).abs()
    assert_within(got, expected, k / 32 * 2.0**-13 * magnitude + UNIT_ROUNDOFF[dtype] * expected.abs())
