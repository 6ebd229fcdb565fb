"""Casts by Transformer Engine's quantisers, through a fake with the arithmetic of its kernels: the same bits
as ours where the two mean the same, and refused where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8train.kernels.te.quantize import TeCaster
from fp8train.layers.fp8_operand import Layouts, quantize_kept, quantize_layouts
from fp8train.numerics.granularity import expand_scales
from fp8train.numerics.scale_state import ScaleSlot
from fp8train.precision.number_formats import E2M1, E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from fp8train.precision.transformer_engine import mismatch
from tests.fakes import te_gemm_fake, te_quantizer_fake
from tests.fakes.transformer_engine_fake import Recorder, install

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
HOPPER, BLACKWELL = (9, 0), (10, 0)


def source(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Magnitudes over 2^-24 to 2^24, zeros, whole blocks of zeros, and amaxes around 1.75 · 2^k, where scales
    that are powers of two turn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 12, (rows, 1), generator=generator).float())
    x = x * torch.exp2(torch.randint(-12, 12, (1, columns), generator=generator).float())
    x[torch.rand(rows, columns, generator=generator) < 0.05] = 0
    x[:32, :32] = 0
    x[40] = 0
    for place, value in enumerate((1.75, 1.75 - 2.0**-7, 1.75 + 2.0**-7, 448.0, 57344.0)):
        x[64 + place, 0] = value * 2.0**20
    return x.to(dtype)


@pytest.fixture(params=[HOPPER, BLACKWELL], ids=["hopper", "blackwell"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return install(monkeypatch, te_gemm_fake.fake, te_quantizer_fake.fake, capability=request.param)


def assert_same(got: Layouts, expected: Layouts) -> None:
    """Codes bit by bit, in both layouts; scales where they multiply anything but zeros."""
    for one, other in zip(got, expected, strict=True):
        assert one[0].dtype == other[0].dtype and one[0].shape == other[0].shape
        assert torch.equal(one[0].view(torch.uint8), other[0].view(torch.uint8))
        values, reference = (
            payload.double() * expand_scales(scale, payload.shape).double() for payload, scale in (one, other)
        )
        assert torch.equal(values.nan_to_num(7), reference.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "block_128x128"])
def test_one_cast_for_both_gemms(
    recorder: Recorder, granularity: str, pow2: bool, fmt: Format, dtype: torch.dtype
) -> None:
    x, spec = source(256, 384, dtype), QuantSpec(fmt, granularity=granularity, power_of_two=pow2)
    for wanted in ((True, True), (True, False), (False, True)):
        rows, columns = wanted
        ours = quantize_layouts(x, spec, contracted=1, rows=rows, columns=columns)
        theirs = quantize_layouts(x, spec, contracted=1, rows=rows, columns=columns, caster=TeCaster())
        assert_same(theirs, ours)
    assert len(recorder.calls) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("granularity", "pow2"), [("block_1x128", True), ("block_1x128", False), ("mx_1x32", True)]
)
def test_a_cast_for_each_gemm(
    recorder: Recorder, granularity: str, pow2: bool, fmt: Format, dtype: torch.dtype
) -> None:
    x, spec = source(256, 384, dtype), QuantSpec(fmt, granularity=granularity, power_of_two=pow2)
    nobody = None, None
    both = quantize_kept(x, "second_copy", (spec, spec), nobody, None, nobody, caster=TeCaster())
    assert recorder.calls == [recorder.calls[0]], "one call makes both"
    assert_same(both, quantize_kept(x, "second_copy", (spec, spec), nobody, None, nobody))
    for contracted in (0, 1):
        theirs = quantize_layouts(x, spec, contracted=contracted, caster=TeCaster())
        assert_same(theirs, quantize_layouts(x, spec, contracted=contracted))
    assert len(recorder.calls) == 3


@pytest.mark.parametrize("pow2", [True, False])
def test_delayed(recorder: Recorder, pow2: bool) -> None:
    """The slot gives the scale and gets the amax."""
    x = source(64 + 32, 48, torch.bfloat16)
    spec = QuantSpec(E4M3, scale_source="delayed", power_of_two=pow2, margin=1)
    scale = torch.tensor(2.0**-16 if pow2 else 0.37 * 2.0**-16)
    running = torch.tensor(3.0), torch.tensor(3.0)
    ours, theirs = (ScaleSlot(scale, amax) for amax in running)
    expected = quantize_layouts(x, spec, ours, contracted=1)
    assert_same(quantize_layouts(x, spec, theirs, contracted=1, caster=TeCaster()), expected)
    assert recorder.calls == ["Float8Quantizer"]
    assert running[0] == running[1] == x.float().abs().max()
    evaluated = quantize_layouts(x, spec, ScaleSlot(scale, None), contracted=1, caster=TeCaster())
    assert_same(evaluated, expected)


def test_a_delayed_scale_that_is_not_there_yet(recorder: Recorder) -> None:
    x, spec, caster = source(96, 48, torch.bfloat16), QuantSpec(E4M3, scale_source="delayed"), TeCaster()
    slot = ScaleSlot(torch.zeros(()), torch.zeros(()))
    assert_same(
        quantize_layouts(x, spec, slot, contracted=1, caster=caster),
        quantize_layouts(x, QuantSpec(E4M3), contracted=1),
    )
    assert recorder.calls == []
    assert slot.amax is not None and slot.amax == x.float().abs().max()
    slot.scale.fill_(0.25)
    quantize_layouts(x, spec, slot, contracted=1, caster=caster)
    assert recorder.calls == ["Float8Quantizer"]


def test_constant(recorder: Recorder) -> None:
    x = source(96, 48, torch.float32)
    spec = QuantSpec(E4M3, scale_source="constant", constant_exponent=-18)
    assert_same(
        quantize_layouts(x, spec, contracted=1, caster=TeCaster()), quantize_layouts(x, spec, contracted=1)
    )
    assert recorder.calls == ["Float8Quantizer"]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("scale_source", ["delayed", "constant"])
def test_a_source_that_is_not_finite_spoils_the_product(
    recorder: Recorder, scale_source: str, bad: float
) -> None:
    x = source(96, 48, torch.float32)
    x[3, 5] = bad
    constant = 0 if scale_source == "constant" else None
    spec = QuantSpec(E4M3, scale_source=scale_source, constant_exponent=constant)
    slot = ScaleSlot(torch.tensor(0.5), torch.zeros(())) if scale_source == "delayed" else None
    (codes, scale_inv), _ = quantize_layouts(x, spec, slot, contracted=1, caster=TeCaster())
    assert scale_inv.isnan() or (bad != bad and codes.double().isnan().any())
    assert recorder.calls == ["Float8Quantizer"]


def test_an_infinity_saturates_where_the_scale_is_its_own(recorder: Recorder) -> None:
    """What the module says of Transformer Engine, and where ours differs."""
    x = source(96, 48, torch.float32)
    x[3, 5] = torch.inf
    (codes, scale_inv), _ = quantize_layouts(x, QuantSpec(E4M3), contracted=1, caster=TeCaster())
    assert scale_inv == 1 and codes[3, 5].double() == 448
    assert quantize_layouts(x, QuantSpec(E4M3), contracted=1).rows[1].isnan()


@pytest.mark.parametrize(
    ("shape", "granularity", "dtype"),
    [
        ((100, 48), "tensor", torch.bfloat16),
        ((96, 128), "block_1x128", torch.bfloat16),
        ((128, 144), "block_128x128", torch.bfloat16),
        ((96, 48), "mx_1x32", torch.bfloat16),
        ((96, 48), "tensor", torch.float64),
    ],
    ids=str,
)
def test_what_a_quantiser_does_not_take_is_cast_by_us(
    recorder: Recorder, shape: tuple, granularity: str, dtype: torch.dtype
) -> None:
    x, spec = source(128, 160, dtype)[: shape[0], : shape[1]], QuantSpec(E4M3, granularity=granularity)
    assert_same(
        quantize_layouts(x, spec, contracted=1, caster=TeCaster()), quantize_layouts(x, spec, contracted=1)
    )
    assert recorder.calls == []


def test_watched_and_agreed_casts_are_ours(recorder: Recorder) -> None:
    x, spec, row = source(96, 48, torch.bfloat16), QuantSpec(E4M3), torch.zeros(8)
    quantize_layouts(x, spec, row=row, contracted=1, caster=TeCaster())
    assert row.any()
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (QuantSpec(E4M3, granularity="row"), "has scales of rows, and it has none"),
        (QuantSpec(E4M3, scale_source="mse"), "has scales of least squared error"),
        (QuantSpec(E4M3, margin=3), "has a margin of 3"),
        (QuantSpec(E4M3, margin=2, granularity="mx_1x32"), "has a margin of 2"),
        (QuantSpec(E2M1, granularity="nv_1x16", power_of_two=False), "its quantiser packs FP4 codes"),
        (QuantSpec(E4M3), None),
        (QuantSpec(E5M2, scale_source="delayed", margin=2, power_of_two=False), None),
        (QuantSpec(E4M3, scale_source="constant", constant_exponent=4), None),
        (QuantSpec(E5M2, granularity="block_1x128", power_of_two=False), None),
        (QuantSpec(E4M3, granularity="mx_1x32"), None),
    ],
    ids=str,
)
def test_which_casts_have_a_quantiser(spec: QuantSpec, reason: str | None) -> None:
    found = mismatch(spec)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    "mutant",
    [lambda real: lambda *a, **k: 1 / real(*a, **k), lambda real: lambda *a, **k: real(*a, **k) * 2],
    ids=["its inverse", "another power of two"],
)
def test_another_scale_would_be_seen(recorder: Recorder, mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_quantizer_fake, "scale_from_amax", mutant(te_quantizer_fake.scale_from_amax))
    x, spec = source(128, 128, torch.bfloat16), QuantSpec(E4M3)
    with pytest.raises(AssertionError):
        assert_same(
            quantize_layouts(x, spec, contracted=1, caster=TeCaster()),
            quantize_layouts(x, spec, contracted=1),
        )


def test_exchanged_layouts_would_be_seen(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    x, spec = source(128, 128, torch.bfloat16), QuantSpec(E4M3, granularity="block_1x128")
    real = TeCaster.cast
    monkeypatch.setattr(TeCaster, "cast", lambda self, *a, **k: real(self, *a, **k)[::-1])
    nobody = None, None
    expected = quantize_kept(x, "second_copy", (spec, spec), nobody, None, nobody)
    with pytest.raises(AssertionError):
        assert_same(
            quantize_kept(x, "second_copy", (spec, spec), nobody, None, nobody, caster=TeCaster()), expected
        )
