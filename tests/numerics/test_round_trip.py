"""Round trip of a quantised tensor."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fp8train.numerics.cast import quantize, uncast
from fp8train.precision.number_formats import E4M3, E5M2, Format
from fp8train.precision.operand_cast import QuantSpec

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=6),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def half_ulp(scaled: float, fmt: Format) -> float:
    """Half the distance between the codes around ``scaled``."""
    exponent = math.frexp(scaled)[1] - 1 if scaled else -1000
    return 0.5 * max(2.0 ** (exponent - fmt.mantissa_bits), 2.0 ** (1 - fmt.bias - fmt.mantissa_bits))


@settings(deadline=None, max_examples=200)
@given(array=arrays, fmt=st.sampled_from([E4M3, E5M2]), margin=st.integers(0, 3))
def test_round_trip_error_is_half_an_ulp(array: np.ndarray, fmt: Format, margin: int) -> None:
    """Power-of-two scales: |x - q| <= half an ulp of the format in x's binade, or half its smallest value."""
    x = torch.from_numpy(array)
    payload, inverse = quantize(x, QuantSpec(fmt, margin=margin))
    values = uncast(payload, inverse, torch.float64).flatten().tolist()
    scale_inv = float(inverse)
    assert payload.shape == x.shape
    for source, value in zip(array.flatten().tolist(), values, strict=True):
        scaled = abs(source) / scale_inv
        assert scaled <= fmt.max * 2.0**-margin or margin  # the far clamp can eat a margin, never the range
        assert scaled <= fmt.max
        assert abs(source - value) <= half_ulp(scaled, fmt) * scale_inv


@settings(deadline=None, max_examples=200)
@given(array=arrays, fmt=st.sampled_from([E4M3, E5M2]))
def test_round_trip_error_with_free_scales(array: np.ndarray, fmt: Format) -> None:
    """The scale and its inverse add three FP32 roundings to half an ulp."""
    x = torch.from_numpy(array)
    payload, inverse = quantize(x, QuantSpec(fmt, power_of_two=False))
    values = uncast(payload, inverse, torch.float64).flatten().tolist()
    scale_inv = float(inverse)
    for source, value in zip(array.flatten().tolist(), values, strict=True):
        slack = abs(source) * 3 * 2.0**-23
        assert (
            abs(source - value) <= half_ulp(abs(source) / scale_inv * (1 + 2.0**-22), fmt) * scale_inv + slack
        )


@settings(deadline=None, max_examples=100)
@given(array=arrays, fmt=st.sampled_from([E4M3, E5M2]))
def test_quantising_twice_changes_nothing(array: np.ndarray, fmt: Format) -> None:
    spec = QuantSpec(fmt)
    x = torch.from_numpy(array).clamp(-1e38, 1e38)  # larger values may round up to 2^128, infinite in FP32
    once = uncast(*quantize(x, spec))
    assert torch.equal(uncast(*quantize(once, spec)), once)
