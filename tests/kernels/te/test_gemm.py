"""Transformer Engine's GEMM on our operands, through a fake that multiplies in float64 what it is handed.

The bound is one rounding to the result's type: the fake adds nothing else. So a scale that is inverted, an
operand that is transposed or a shape of scales that TE would refuse cannot pass.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fp8train.kernels.gemm import fp8_gemm
from fp8train.kernels.gemm_choice import choose_gemm_backend
from fp8train.kernels.te import gemm as te_gemm
from fp8train.kernels.te.quantize import TeCaster
from fp8train.numerics.cast import quantize
from fp8train.numerics.granularity import expand_scales
from fp8train.precision.linear_gemms import LinearQuant
from fp8train.precision.number_formats import E2M1, E4M3, E5M2
from fp8train.precision.operand_cast import QuantSpec
from tests.fakes import te_gemm_fake
from tests.fakes.transformer_engine_fake import Recorder, install

UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}
HOPPER, BLACKWELL = (9, 0), (10, 0)
TENSOR = ("tensor", "tensor")
BLOCKS = [
    ("block_1x128", "block_1x128"),
    ("block_1x128", "block_128x128"),
    ("block_128x128", "block_1x128"),
]
MX = ("mx_1x32", "mx_1x32")


def operand(
    rows: int, columns: int, kind: str, contracted: int, seed: int, *, fmt=E4M3, pow2: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows and columns differ by factors of up to 2^12, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp2(torch.randint(-6, 6, (rows, 1), generator=generator).float())
    x = x * torch.exp2(torch.randint(-6, 6, (1, columns), generator=generator).float())
    spec = QuantSpec(fmt, granularity=kind, power_of_two=pow2 or kind == "mx_1x32")
    return quantize(x, spec, contracted=contracted)


def wide(operand: tuple[Tensor, Tensor]) -> Tensor:
    payload, scale_inv = operand
    return payload.double() * expand_scales(scale_inv, payload.shape).double()


def assert_product(got: Tensor, a: tuple, b: tuple, alpha: float) -> None:
    expected = alpha * (wide(a) @ wide(b))
    magnitude = abs(alpha) * (wide(a).abs() @ wide(b).abs())
    limit = UNIT[got.dtype] * expected.abs() + 2.0**-45 * magnitude  # float64 sums in another order
    assert ((got.double() - expected).abs() <= limit).all()


def multiply(a: tuple, b: tuple, dtype: torch.dtype, *, pow2: bool = True, **how) -> Tensor:
    return fp8_gemm(a[0], b[0], a[1], b[1], power_of_two=pow2, out_dtype=dtype, backend="te", **how)


CASES = [
    *(((8, 9), TENSOR, pow2) for pow2 in (True, False)),
    *((HOPPER, TENSOR, pow2) for pow2 in (True, False)),
    *((HOPPER, kinds, pow2) for kinds in BLOCKS for pow2 in (True, False)),
    *((BLACKWELL, kinds, True) for kinds in (TENSOR, *BLOCKS, MX)),
]


@pytest.mark.parametrize(("capability", "kinds", "pow2"), CASES, ids=str)
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=["44", "54", "45"])
@pytest.mark.parametrize("shape", [(48, 384, 144), (208, 256, 336)], ids=str)
def test_equals_float64(
    monkeypatch: pytest.MonkeyPatch, capability: tuple, kinds: tuple, pow2: bool, formats: tuple, shape: tuple
) -> None:
    """As the output GEMM has its operands: a row-major, b the transpose of a row-major weight."""
    recorder = install(monkeypatch, te_gemm_fake.fake, capability=capability)
    m, k, n = shape
    a = operand(m, k, kinds[0], 1, 1, fmt=formats[0], pow2=pow2)
    b = operand(k, n, kinds[1], 0, 2, fmt=formats[1], pow2=pow2)
    for dtype in UNIT:
        for alpha in (1.0, 0.3):
            assert_product(multiply(a, b, dtype, pow2=pow2, alpha=alpha), a, b, alpha)
    assert len(recorder.calls) == 4
    assert {call["alpha"] for call in recorder.arguments} == {1.0, 0.3}
    assert all(call["layout"] == "TN" for call in recorder.arguments)


@pytest.mark.parametrize("kinds", [TENSOR, *BLOCKS])
@pytest.mark.parametrize("order", ["grad_input", "grad_weight"])
def test_operands_of_backward(monkeypatch: pytest.MonkeyPatch, kinds: tuple, order: str) -> None:
    """grad_input: g [T, N] · w [N, K] as w lies; grad_weight: gᵀ, a view, · x [T, K] as x lies."""
    recorder = install(monkeypatch, te_gemm_fake.fake)
    if order == "grad_input":
        a, b = operand(64, 128, kinds[0], 1, 1, fmt=E5M2), operand(128, 272, kinds[1], 0, 2)
        b = b[0].contiguous(), b[1].contiguous()
    else:
        turned = operand(256, 128, kinds[0], 0, 1, fmt=E5M2)
        a = turned[0].t(), turned[1].t() if turned[1].dim() else turned[1]
        b = operand(256, 272, kinds[1], 0, 2)
    if order == "grad_input" and kinds != TENSOR:
        a, b = operand(64, 256, kinds[0], 1, 1, fmt=E5M2), operand(256, 272, kinds[1], 0, 2)
    assert_product(multiply(a, b, torch.bfloat16), a, b, 1.0)
    assert recorder.calls == ["general_gemm"]


@pytest.mark.parametrize("rows", [16, 33])
def test_any_number_of_rows_with_one_scale(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    recorder = install(monkeypatch, te_gemm_fake.fake)
    a, b = operand(rows, 48, "tensor", 1, 1), operand(48, 80, "tensor", 0, 2)
    assert_product(multiply(a, b, torch.bfloat16), a, b, 1.0)
    assert recorder.calls == ["general_gemm"]


@pytest.mark.parametrize(("fast", "split"), [(False, True), (True, False)])
def test_accumulation(monkeypatch: pytest.MonkeyPatch, fast: bool, split: bool) -> None:
    recorder = install(monkeypatch, te_gemm_fake.fake)
    a, b = operand(16, 32, "tensor", 1, 1), operand(32, 16, "tensor", 0, 2)
    multiply(a, b, torch.bfloat16, fast_accumulation=fast)
    assert recorder.arguments[0]["split"] == split


ELSEWHERE = [
    (HOPPER, ("row", "row"), (16, 128, 256), True),
    (HOPPER, ("row", "tensor"), (16, 128, 256), True),
    (HOPPER, MX, (128, 256, 128), True),  # no MXFP8 on Hopper
    ((12, 0), MX, (128, 256, 128), True),
    (HOPPER, ("block_128x128", "block_128x128"), (256, 256, 256), True),
    (HOPPER, ("block_1x128", "block_1x128"), (64, 272, 64), True),  # a short block along K
    (HOPPER, ("block_1x128", "block_128x128"), (36, 256, 256), True),  # not a multiple of 8 rows
    (BLACKWELL, ("block_1x128", "block_128x128"), (64, 256, 256), False),  # MXFP8 has powers of two only
    ((8, 9), ("block_1x128", "block_128x128"), (64, 256, 256), True),
    (HOPPER, ("mx_1x32", "block_128x128"), (64, 256, 256), True),
]


@pytest.mark.parametrize(("capability", "kinds", "shape", "pow2"), ELSEWHERE, ids=str)
def test_what_it_does_not_multiply_goes_where_it_went(
    monkeypatch: pytest.MonkeyPatch, capability: tuple, kinds: tuple, shape: tuple, pow2: bool
) -> None:
    recorder = install(monkeypatch, te_gemm_fake.fake, capability=capability)
    m, k, n = shape
    a, b = operand(m, k, kinds[0], 1, 1, pow2=pow2), operand(k, n, kinds[1], 0, 2, pow2=pow2)
    got = multiply(a, b, torch.float32, pow2=pow2)
    expected, magnitude = wide(a) @ wide(b), wide(a).abs() @ wide(b).abs()
    assert (
        (got.double() - expected).abs() <= (k + 8) * 2.0**-24 * magnitude + 2.0**-24 * expected.abs()
    ).all()
    assert recorder.calls == []


def test_nan_scales_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that was not finite, whose scale says so, spoils what it scales and nothing else."""
    install(monkeypatch, te_gemm_fake.fake)
    a, b = operand(16, 256, "block_1x128", 1, 1), operand(256, 128, "block_128x128", 0, 2)
    scales = a[1].clone()
    scales[3, 1] = torch.nan
    got = multiply((a[0], scales), b, torch.bfloat16)
    assert got[3].isnan().all()
    assert not got[[0, 1, 2, 4, 15]].isnan().any()


def test_nan_scales_arrive_as_e8m0(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, te_gemm_fake.fake, capability=BLACKWELL)
    a, b = operand(16, 256, "mx_1x32", 1, 1), operand(256, 128, "mx_1x32", 0, 2)
    scales = a[1].clone()
    scales[3, 1] = torch.nan
    got = multiply((a[0], scales), b, torch.bfloat16)
    assert got[3].isnan().all()
    assert not got[[0, 1, 2, 4, 15]].isnan().any()


def inverted(codes: Tensor, scale_inv: Tensor, kind: str, real=te_gemm.storage) -> object:
    return real(codes, 1 / scale_inv, kind)


def of_the_other_operand(codes: Tensor, scale_inv: Tensor, kind: str, real=te_gemm.storage) -> object:
    return real(codes, scale_inv.roll(1, 0) if scale_inv.dim() else scale_inv, kind)


def turned(codes: Tensor, scale_inv: Tensor, kind: str, real=te_gemm.storage) -> object:
    return real(codes.t().contiguous(), scale_inv, kind)


def scales_turned(codes: Tensor, scale_inv: Tensor, kind: str, real=te_gemm.storage) -> object:
    return real(
        codes, scale_inv.t().contiguous().view(scale_inv.shape) if scale_inv.dim() else scale_inv, kind
    )


@pytest.mark.parametrize(
    ("mutant", "capability", "kinds"),
    [
        *((inverted, HOPPER, kinds) for kinds in (TENSOR, *BLOCKS)),
        (inverted, BLACKWELL, MX),
        (turned, HOPPER, TENSOR),
        (turned, BLACKWELL, MX),
        *((of_the_other_operand, HOPPER, kinds) for kinds in BLOCKS),
        (scales_turned, HOPPER, BLOCKS[0]),
        (scales_turned, BLACKWELL, MX),
    ],
)
def test_another_convention_would_be_seen(
    monkeypatch: pytest.MonkeyPatch, mutant, capability: tuple, kinds: tuple
) -> None:
    """The comparison with float64 fails, or the fake refuses, if a convention is broken."""
    install(monkeypatch, te_gemm_fake.fake, capability=capability)
    monkeypatch.setattr(te_gemm, "storage", mutant)
    a, b = operand(256, 256, kinds[0], 1, 1), operand(256, 256, kinds[1], 0, 2)
    with pytest.raises(AssertionError):
        assert_product(multiply(a, b, torch.float32), a, b, 1.0)


def test_exchanged_operands_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A and B of BLAS in our order: refused for its shapes, or the transposed product where they agree."""
    install(monkeypatch, te_gemm_fake.fake)
    cpp = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    real = cpp.general_gemm
    monkeypatch.setattr(cpp, "general_gemm", lambda A, B, **how: real(B, A, **how))
    a, b = operand(256, 256, "tensor", 1, 1), operand(256, 256, "tensor", 0, 2)
    with pytest.raises(AssertionError):
        assert_product(multiply(a, b, torch.float32), a, b, 1.0)


def choose(q: LinearQuant | None, dtype: torch.dtype = torch.bfloat16):
    return choose_gemm_backend(torch.device("cuda"), dtype, q, "te")


def rows() -> LinearQuant:
    row = QuantSpec(E4M3, granularity="row")
    return LinearQuant(row, row, row, row, row, row, keep_x="second_copy", keep_w="second_copy")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch, te_gemm_fake.fake)


@pytest.mark.usefixtures("hopper")
def test_chosen_where_it_multiplies() -> None:
    backend = choose(LinearQuant())
    assert backend.name == "te"
    assert backend.reason == "Transformer Engine's GEMM, compute capability 9.0"


@pytest.mark.usefixtures("hopper")
def test_the_reason_names_the_gemms_of_others() -> None:
    row, tensor = QuantSpec(E4M3, granularity="row"), QuantSpec(E4M3)
    mixed = LinearQuant(
        row, row, QuantSpec(E5M2), tensor, QuantSpec(E5M2), tensor, keep_x="second_copy", keep_w="second_copy"
    )
    reason = choose(mixed).reason
    assert "not for output (row x row): torch's scaled matmul" in reason
    assert "grad_weight" not in reason


@pytest.mark.usefixtures("hopper")
def test_the_reason_tells_the_rule_for_shapes() -> None:
    x, w = QuantSpec(E4M3, granularity="block_1x128"), QuantSpec(E4M3, granularity="block_128x128")
    blocks = LinearQuant(x, w, x, w, x, x, keep_x="second_copy")
    assert "K is a multiple of 128 and 1x128 operands have a multiple of 8 rows" in choose(blocks).reason


@pytest.mark.usefixtures("hopper")
def test_refused_where_it_multiplies_nothing() -> None:
    with pytest.raises(ValueError, match=r"`gemm`: te has no kernel for output \(row x row\).*`gemm`=auto"):
        choose(rows())


@pytest.mark.usefixtures("hopper")
def test_refused_for_types_and_devices() -> None:
    with pytest.raises(ValueError, match=r"`gemm`: te multiplies to BF16 or FP32.*`gemm`=auto"):
        choose(LinearQuant(), torch.float64)
    with pytest.raises(ValueError, match=r"`gemm`: te needs an NVIDIA GPU.*CPU; set `gemm`=auto"):
        choose_gemm_backend(torch.device("cpu"), torch.bfloat16, LinearQuant(), "te")
    e2m1 = QuantSpec(E2M1, granularity="nv_1x16", power_of_two=False)
    nvfp4 = LinearQuant(e2m1, e2m1, e2m1, e2m1, e2m1, e2m1, keep_x="second_copy", keep_w="second_copy")
    with pytest.raises(ValueError, match=r"`gemm`: te cannot multiply what the simulation of NVFP4 makes"):
        choose(nvfp4)


def test_refused_on_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, te_gemm_fake.fake, capability=(8, 0))
    with pytest.raises(ValueError, match=r"need compute capability 8\.9"):
        choose(LinearQuant())


def test_there_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told when the model is built how to install it, and what to write instead."""
    install(monkeypatch, te_gemm_fake.fake)
    for name in [name for name in sys.modules if name.startswith("transformer_engine.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"Transformer Engine cannot be imported.*pip install.*write auto"):
        choose(LinearQuant())
    with pytest.raises(ValueError, match="cannot be imported"):
        TeCaster()
