"""Cast statistics against numpy, and which sites a recorder reports."""

import math

import numpy as np
import pytest
import torch

from fp8train.numerics.cast import cast, quantize
from fp8train.numerics.statistics import FIELDS, CastRecorder, cast_statistics
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE

TABLES = {"e4m3": E4M3_TABLE, "e5m2": E5M2_TABLE}


def brute_force(x: np.ndarray, codes: np.ndarray, scale_inv: float, fmt: Format) -> dict[str, float]:
    """Element by element in Python floats."""
    table = TABLES[fmt.name]
    decoded = [table.decode(int(code)) * scale_inv for code in codes.flatten()]
    source = [float(value) for value in x.flatten()]
    nonzero = [(s, d) for s, d in zip(source, decoded, strict=True) if s != 0]
    signal = sum(s * s for s in source)
    noise = sum((s - d) ** 2 for s, d in zip(source, decoded, strict=True))
    return {
        "amax": max(abs(s) for s in source),
        "rms": math.sqrt(signal / len(source)),
        "log2_scale": -math.log2(scale_inv),
        "zero": 1 - len(nonzero) / len(source),
        "flushed": sum(d == 0 for _, d in nonzero) / max(1, len(nonzero)),
        "saturated": sum(abs(s) / scale_inv > fmt.max for s, _ in nonzero) / max(1, len(nonzero)),
        "snr_db": 10 * math.log10(signal / noise) if noise else math.inf,
        "kurtosis": sum(s**4 for s in source) * len(source) / signal**2,
    }


def row_of(x: torch.Tensor, payload: torch.Tensor, scale_inv: torch.Tensor) -> dict[str, float]:
    return dict(zip(FIELDS, cast_statistics(x, payload, scale_inv).tolist(), strict=True))


def wide(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, values that flush, values of twenty binades."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 30, generator=generator) * torch.exp2(torch.randn(40, 30, generator=generator) * 6)
    x[::4, ::3] = 0
    return x.to(dtype)


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_equal_brute_force(fmt: Format, dtype: torch.dtype) -> None:
    x = wide(dtype)
    payload, scale_inv = quantize(x, QuantSpec(fmt))
    expected = brute_force(x.double().numpy(), payload.view(torch.uint8).numpy(), float(scale_inv), fmt)
    got = row_of(x, payload, scale_inv)
    assert got == pytest.approx(expected, rel=1e-5)
    assert 0.08 < got["zero"] < 0.09
    assert fmt is E5M2 or got["flushed"] > 0.01
    assert got["saturated"] == 0


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_saturation_is_counted_from_the_source(fmt: Format) -> None:
    """A scale that is too large by 2^6, as a delayed one may be: the payload saturates, the count tells."""
    x = wide(torch.float32)
    _, scale_inv = quantize(x, QuantSpec(fmt))
    scale_inv = scale_inv / 64
    payload = cast(x, fmt, 1 / scale_inv)
    got = row_of(x, payload, scale_inv)
    expected = brute_force(x.numpy(), payload.view(torch.uint8).numpy(), float(scale_inv), fmt)
    assert got == pytest.approx(expected, rel=1e-5)
    assert got["saturated"] > 0.004


@pytest.mark.parametrize("margin", [0, 2])
def test_free_scales_do_not_count_their_own_rounding(margin: int) -> None:
    spec = QuantSpec(E4M3, power_of_two=False, margin=margin)
    for seed in range(50):
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        payload, scale_inv = quantize(x, spec)
        got = row_of(x, payload, scale_inv)
        assert got["saturated"] == 0
        assert got["log2_scale"] == pytest.approx(
            math.log2(448 * 2.0**-margin / float(x.abs().max())), abs=1e-5
        )


def test_zeros_and_exact_casts() -> None:
    x = torch.zeros(8)
    got = row_of(x, *quantize(x, QuantSpec(E4M3)))
    expected = {
        "amax": 0,
        "rms": 0,
        "log2_scale": 0,
        "zero": 1,
        "flushed": 0,
        "saturated": 0,
        "snr_db": math.inf,
        "kurtosis": 0,
    }
    assert got == expected
    exact = torch.tensor([1.0, -2.0, 0.5, 1.75])
    assert row_of(exact, *quantize(exact, QuantSpec(E4M3)))["snr_db"] == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_sources_are_shown(value: float) -> None:
    x = torch.tensor([1.0, value, 0.0, 2.0])
    recorder = CastRecorder(["a", "b"], torch.device("cpu"))
    recorder.record("a", x, *quantize(x, QuantSpec(E4M3)))
    row = recorder.collect()["a"]
    assert not math.isfinite(row["amax"])
    assert math.isnan(row["log2_scale"])
    assert math.isnan(row["snr_db"])
    assert row["zero"] == 0.25


def test_recorder_keeps_the_last_row_of_each_recorded_site() -> None:
    recorder = CastRecorder(["layers.0.q/x", "layers.0.q/w", "layers.0.q/grad_output"], torch.device("cpu"))
    assert recorder.collect() == {}
    assert not recorder.active
    for size in (3.0, 5.0):
        x = torch.tensor([size, 1.0])
        recorder.record("layers.0.q/w", x, *quantize(x, QuantSpec(E4M3)))
    table = recorder.collect()
    assert list(table) == ["layers.0.q/w"]
    assert list(table["layers.0.q/w"]) == list(FIELDS)
    assert table["layers.0.q/w"]["amax"] == 5.0
    with pytest.raises(KeyError):
        recorder.record("layers.9.q/w", x, *quantize(x, QuantSpec(E4M3)))
