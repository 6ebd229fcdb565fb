"""The FP8 GEMM against a float64 product of the decoded payloads.

Error bounds, per element, with ``S = sum_k |a_k b_k|`` of the scaled operands: K exact products added up with
unit roundoff u in any order are off by at most ``K · u · S`` to first order (Higham, Accuracy and Stability
of Numerical Algorithms, §3.1); then the result is rounded to the output type. Products of FP8 values have at
most 8 significant bits: exact in FP32.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp8train.kernels import gemm
from fp8train.kernels.decode import folds
from fp8train.kernels.gemm import check_operands, fp8_gemm, scaled_mm
from fp8train.kernels.gemm_choice import choose_gemm_backend

pytestmark = pytest.mark.usefixtures("each_cpu")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PAIRS = [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)]
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def payload(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values over the whole range of the format, subnormals and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randn(rows, columns, generator=generator) * 3)
    x = torch.randn(rows, columns, generator=generator) * spread
    x[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return x.clamp(-400, 400).to(dtype)


def exact(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(product, sum of magnitudes) in float64."""
    wide_a, wide_b = a.double(), b.double()
    return (wide_a @ wide_b) * scale, (wide_a.abs() @ wide_b.abs()) * abs(scale)


def bound(magnitude: Tensor, value: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """K products and the two scales accumulate in FP32 (FP64 for FP64), then one rounding to ``dtype``."""
    accumulate = min(UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF[torch.float32])
    return (k + 4) * accumulate * magnitude + UNIT_ROUNDOFF[dtype] * value.abs()


def assert_within(got: Tensor, expected: Tensor, limit: Tensor) -> None:
    error = (got.double() - expected).abs()
    assert (error <= limit).all(), f"worst error {float((error - limit).max()):.3g} above its bound"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("type_a", "type_b"), PAIRS)
@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (1, 32, 16), (33, 48, 80), (64, 512, 32)])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_equals_float64(
    dtype: torch.dtype, type_a: torch.dtype, type_b: torch.dtype, m: int, k: int, n: int, power_of_two: bool
) -> None:
    a, b = payload(m, k, type_a, 1), payload(k, n, type_b, 2)
    inv_a, inv_b = (0.125, 4.0) if power_of_two else (0.3, 1.7)
    scale_a, scale_b = torch.tensor(inv_a), torch.tensor(inv_b)
    factor = float(scale_a) * float(scale_b)
    got = fp8_gemm(a, b, scale_a, scale_b, power_of_two=power_of_two, out_dtype=dtype, backend="decode")
    expected, magnitude = exact(a, b, factor)
    assert got.dtype == dtype
    assert got.shape == (m, n)
    assert_within(got, expected, bound(magnitude, expected, k, dtype))


def test_the_bound_is_sharp_enough_to_catch_a_wrong_code() -> None:
    """One payload off by one code breaks the FP32 bound: the comparison above could fail."""
    a, b = payload(16, 64, E4M3, 1), payload(64, 16, E4M3, 2)
    one = torch.tensor(1.0)
    expected, magnitude = exact(a, b, 1.0)
    wrong = a.view(torch.uint8).clone()
    wrong[0, 0] ^= 1
    got = fp8_gemm(
        wrong.view(E4M3), b, one, one, power_of_two=True, out_dtype=torch.float32, backend="decode"
    )
    error = (got.double() - expected).abs()
    assert (error > bound(magnitude, expected, 64, torch.float32)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_strides(dtype: torch.dtype) -> None:
    """Transposed and sliced payloads, as backward passes them."""
    a, b = payload(32, 48, E5M2, 3), payload(64, 48, E4M3, 4)
    one = torch.tensor(1.0)

    expected, magnitude = exact(a, b.t(), 1.0)
    wide = torch.zeros(32, 96, dtype=torch.uint8).view(E5M2)
    wide.view(torch.uint8)[:, :48] = a.view(torch.uint8)
    for left in (a, a.t().contiguous().t(), wide[:, :48]):
        for right in (b.t(), b.t().contiguous()):
            got = fp8_gemm(left, right, one, one, power_of_two=True, out_dtype=dtype, backend="decode")
            assert_within(got, expected, bound(magnitude, expected, 48, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.5, 0.1, -3.0])
def test_alpha(dtype: torch.dtype, alpha: float) -> None:
    a, b = payload(16, 32, E4M3, 5), payload(32, 16, E4M3, 6)
    scale = torch.tensor(0.25)
    got = fp8_gemm(a, b, scale, scale, alpha=alpha, power_of_two=True, out_dtype=dtype, backend="decode")
    expected, magnitude = exact(a, b, alpha / 16)
    assert_within(got, expected, bound(magnitude, expected, 32, dtype))


FOLD_EDGES = [-91, -90, -89, 5, 6, 7]
"""Around the range in which the BF16 path folds the scale into an operand."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [*FOLD_EDGES, -110, -60, 0, 40, 90])
@pytest.mark.parametrize("split", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("swap", [False, True])
def test_extreme_scales(dtype: torch.dtype, exponent: int, split: float, swap: bool) -> None:
    """Whatever 2^e the scales multiply to, however it is split, and whichever operand is the smaller."""
    first = int(exponent * split)
    scale_a, scale_b = torch.tensor(2.0**first), torch.tensor(2.0 ** (exponent - first))
    m, n = (16, 96) if swap else (96, 16)
    a, b = payload(m, 32, E5M2, 7), payload(32, n, E4M3, 8)
    got = fp8_gemm(a, b, scale_a, scale_b, power_of_two=True, out_dtype=dtype, backend="decode")
    expected, magnitude = exact(a, b, 2.0**exponent)
    assert_within(got, expected, bound(magnitude, expected, 32, dtype) + 2.0**-133)


@pytest.mark.parametrize("array", [False, True])
def test_what_a_cpu_multiplies(each_cpu: bool, array: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16 operands where it has instructions for them, the result is BF16 and scales are powers of two."""
    seen = []
    whole = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(a.dtype) or whole(a, b))
    a, b = payload(16, 32, E4M3, 1), payload(32, 48, E4M3, 2)
    scale, one = torch.full((16, 1) if array else (), 0.5), torch.tensor(1.0)
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    native = bf16 if each_cpu else fp32
    for dtype, pow2, alpha, expected in (
        *((bf16, True, 1.0, native), (bf16, False, 1.0, fp32), (bf16, True, 0.3, fp32)),
        *((fp32, True, 1.0, fp32), (fp64, True, 1.0, fp64)),
    ):
        fp8_gemm(a, b, scale, one, alpha=alpha, power_of_two=pow2, out_dtype=dtype, backend="decode")
        assert seen.pop() == expected, (dtype, pow2, alpha)


def test_what_is_folded() -> None:
    """The smallest product is 2^-25, of the smallest E4M3 and E5M2; BF16 instructions flush below 2^-126."""
    folded = [exponent for exponent in range(-140, 128) if folds(2.0**exponent)]
    assert folded == list(range(-90, 7))
    smallest = 2.0**-9 * 2.0**-16
    assert smallest * 2.0 ** folded[0] >= 2.0**-126


@pytest.mark.parametrize("exponent", [-102, -101, *FOLD_EDGES, 90, 91])
def test_the_smallest_and_the_largest_product(exponent: int) -> None:
    """One product of the smallest values, and sums of the largest: exact on either side of every edge."""
    for first, second in ((2.0**-16, 2.0**-9), (57344.0, 448.0)):
        a, b = torch.zeros(16, 16), torch.zeros(16, 96)
        a[0, 0], b[0, 0] = first, second
        scale, one = torch.tensor(2.0**exponent), torch.tensor(1.0)
        got = fp8_gemm(
            *(a.to(E5M2), b.to(E4M3), scale, one),
            power_of_two=True,
            out_dtype=torch.bfloat16,
            backend="decode",
        )
        assert float(got[0, 0]) == first * second * 2.0**exponent


@pytest.mark.parametrize("swap", [False, True])
def test_folding_loses_no_operand(swap: bool) -> None:
    """The scale times one operand alone may leave BF16's range where the product is an ordinary number."""
    small, large = torch.zeros(16, 16), torch.zeros(16, 96)
    for exponent, first, second in ((-118, 2.0**-16, 2.0**8), (115, 57344.0, 2.0**-9)):
        small[0, 0], large[0, 0] = first, second
        a, b = small.to(E5M2), large.to(E4M3)
        pair = (b.t(), a.t()) if swap else (a, b)
        scale, one = torch.tensor(2.0**exponent), torch.tensor(1.0)
        got = fp8_gemm(*pair, scale, one, power_of_two=True, out_dtype=torch.bfloat16, backend="decode")
        assert float(got[0, 0]) == first * second * 2.0**exponent


def test_scales_do_not_change_a_bit() -> None:
    """Powers of two commute with rounding: the same significands inside and outside the folding range."""
    a, b = payload(48, 64, E4M3, 9), payload(64, 32, E5M2, 10)
    one = torch.tensor(1.0)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        plain = fp8_gemm(a, b, one, one, power_of_two=True, out_dtype=dtype, backend="decode")
        for exponent in (*FOLD_EDGES, 60):
            scale = torch.tensor(2.0**exponent)
            scaled = fp8_gemm(a, b, scale, one, power_of_two=True, out_dtype=dtype, backend="decode")
            assert torch.equal(scaled.double(), plain.double() * 2.0**exponent), (dtype, exponent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_beyond_fp32(dtype: torch.dtype) -> None:
    """The product of two scales may leave FP32: zeros stay zero, the rest overflows or vanishes."""
    a = torch.zeros(16, 16)
    a[0, 0] = 1.0
    a = a.to(E4M3)
    smallest = -149 if dtype == torch.float32 else -133
    for exponent in (252, 140, 129, 128, 127, 126, -126, -127, -128, -133, -140, -149, -150, -160, -252):
        first = exponent // 2
        scales = torch.tensor(2.0**first), torch.tensor(2.0 ** (exponent - first))
        got = fp8_gemm(a, a, *scales, power_of_two=True, out_dtype=dtype, backend="decode").float()
        corner = math.inf if exponent > 127 else 2.0**exponent if exponent >= smallest else 0.0
        assert float(got[0, 0]) == corner, exponent
        assert not got.flatten()[1:].any()
    for value, exponent in ((2.0**-9, 128), (2.0**-9, 134), (256.0, -127), (256.0, -149), (256.0, -150)):
        b = torch.zeros(16, 16)
        b[0, 0] = value
        first = exponent // 2
        scales = torch.tensor(2.0**first), torch.tensor(2.0 ** (exponent - first))
        got = fp8_gemm(b.to(E4M3), a, *scales, power_of_two=True, out_dtype=dtype, backend="decode")
        corner = value * 2.0**exponent
        assert float(got[0, 0]) == (corner if corner >= 2.0**smallest else 0.0), (value, exponent)
    far, near = torch.tensor(2.0**126), torch.tensor(2.0**-126)
    got = fp8_gemm(a, a, far, near, power_of_two=True, out_dtype=dtype, backend="decode")
    assert float(got[0, 0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_nan_scale_poisons_every_output(dtype: torch.dtype, power_of_two: bool) -> None:
    zeros = torch.zeros(16, 32).to(E4M3)
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    for pair in ((bad, good), (good, bad), (bad, bad)):
        got = fp8_gemm(zeros, zeros.t(), *pair, power_of_two=power_of_two, out_dtype=dtype, backend="decode")
        assert got.isnan().all()


REFUSED: list[tuple[str, Callable[[], tuple[Tensor, Tensor]], str]] = [
    ("e5m2 by e5m2", lambda: (payload(16, 16, E5M2, 0), payload(16, 16, E5M2, 0)), "E5M2 by E5M2"),
    ("bf16 operand", lambda: (torch.zeros(16, 16).bfloat16(), payload(16, 16, E4M3, 0)), "torch.bfloat16"),
    ("K of 24", lambda: (payload(16, 24, E4M3, 0), payload(24, 16, E4M3, 0)), "K=24, N=16"),
    ("N of 8", lambda: (payload(16, 16, E4M3, 0), payload(16, 8, E4M3, 0)), "K=16, N=8"),
    ("shapes", lambda: (payload(16, 32, E4M3, 0), payload(16, 32, E4M3, 0)), r"\(16, 32\) and \(16, 32\)"),
    ("vector", lambda: (payload(1, 16, E4M3, 0)[0], payload(16, 16, E4M3, 0)), r"\(16,\) and"),
]


@pytest.mark.parametrize(
    ("operands", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
@pytest.mark.parametrize("backend", ["decode", "scaled_mm"])
def test_refuses_what_a_gpu_refuses(
    operands: Callable[[], tuple[Tensor, Tensor]], message: str, backend: str
) -> None:
    a, b = operands()
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=message):
        check_operands(a, b)
    with pytest.raises(ValueError, match=message):
        fp8_gemm(a, b, one, one, power_of_two=True, out_dtype=torch.float32, backend=backend)
    with pytest.raises(ValueError, match=message):
        scaled_mm(a, b, one, one, out_dtype=torch.float32)


def test_scaled_mm_insists_on_the_layouts_of_a_gpu() -> None:
    """torch's CPU kernel takes any strides; a tensor core does not."""
    a, b = payload(16, 32, E4M3, 0), payload(32, 48, E4M3, 1)
    one = torch.tensor(1.0)
    column_major = b.t().contiguous().t()
    assert scaled_mm(a, column_major, one, one, out_dtype=torch.float32).shape == (16, 48)
    with pytest.raises(ValueError, match=r"B must be column-major, its strides are \(48, 1\)"):
        scaled_mm(a, b, one, one, out_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"A must be row-major, its strides are \(1, 16\)"):
        scaled_mm(a.t().contiguous().t(), column_major, one, one, out_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("type_a", "type_b"), PAIRS)
@pytest.mark.parametrize("alpha", [1.0, 0.375])
def test_both_implementations_agree(
    dtype: torch.dtype, type_a: torch.dtype, type_b: torch.dtype, alpha: float
) -> None:
    a, b = payload(16, 64, type_a, 11), payload(64, 32, type_b, 12)
    scales = torch.tensor(0.5), torch.tensor(8.0)
    expected, magnitude = exact(a, b, 4.0 * alpha)
    limit = bound(magnitude, expected, 64, dtype)
    for backend in ("decode", "scaled_mm"):
        got = fp8_gemm(a, b, *scales, alpha=alpha, power_of_two=True, out_dtype=dtype, backend=backend)
        assert got.dtype == dtype
        assert_within(got, expected, limit)


def test_scaled_mm_gets_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts are made for it; fast accumulation and the output type arrive."""
    calls: list[dict[str, object]] = []

    def spy(a: Tensor, b: Tensor, *scales: Tensor, **options: object) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        calls.append(options)
        return torch.zeros(a.shape[0], b.shape[1])

    monkeypatch.setattr(gemm, "scaled_mm", spy)
    a, b = payload(16, 32, E4M3, 0).t(), payload(16, 48, E4M3, 0)
    one = torch.tensor(1.0)
    for fast in (False, True):
        fp8_gemm(
            a,
            b,
            one,
            one,
            power_of_two=True,
            out_dtype=torch.bfloat16,
            backend="scaled_mm",
            fast_accumulation=fast,
        )
    assert calls == [{"out_dtype": torch.bfloat16, "fast_accumulation": fast} for fast in (False, True)]


def test_backend_of_this_machine() -> None:
    backend = choose_gemm_backend(torch.device("cpu"), torch.bfloat16)
    assert backend.name == "decode"
    assert "CPU" in backend.reason


def test_old_gpus_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"8\.9 or newer, NVIDIA A100 has 8\.0; write `fp8`=false"):
        choose_gemm_backend(device, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_gemm_backend(device, torch.bfloat16).name == "scaled_mm"
    assert choose_gemm_backend(device, torch.float64).name == "decode"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("type_a", "type_b"), PAIRS)
def test_tensor_cores_equal_float64(dtype: torch.dtype, type_a: torch.dtype, type_b: torch.dtype) -> None:
    """Hopper accumulates in about 14 bits between promotions; the bound is that of an FP22 accumulator."""
    a, b = payload(48, 256, type_a, 13), payload(256, 80, type_b, 14)
    scales = torch.tensor(0.5), torch.tensor(8.0)
    got = fp8_gemm(
        a.cuda(),
        b.cuda(),
        scales[0].cuda(),
        scales[1].cuda(),
        power_of_two=True,
        out_dtype=dtype,
        backend=choose_gemm_backend(torch.device("cuda"), dtype).name,
    ).cpu()
    expected, magnitude = exact(a, b, 4.0)
    assert_within(got, expected, 256 / 32 * 2.0**-13 * magnitude + UNIT_ROUNDOFF[dtype] * expected.abs())
