"""Rotary positions against complex multiplication in FP64, Llama-3's scaling against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from fp8train.kernels.rotary import apply_rotary
from fp8train.layers.rotary import RopeScaling, rotary_frequencies, rotary_table

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_complex_multiplication(theta: float) -> None:
    length, dim = 700, 16
    x = torch.randn(2, 3, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_table(rotary_frequencies(dim, theta, None), length, torch.float64)
    rotated = apply_rotary(x, cos, sin)
    for position in (0, 1, 13, length - 1):
        for pair in range(dim // 2):
            turn = complex(0, position * theta ** (-2 * pair / dim))
            rotor = complex(math.cos(turn.imag), math.sin(turn.imag))
            value = complex(x[1, 2, position, pair], x[1, 2, position, pair + dim // 2]) * rotor
            assert rotated[1, 2, position, pair].item() == pytest.approx(value.real, abs=1e-12)
            assert rotated[1, 2, position, pair + dim // 2].item() == pytest.approx(value.imag, abs=1e-12)


def test_products_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    cos, sin = rotary_table(rotary_frequencies(8, 10000.0, None), 64, torch.float64)
    queries, keys = (apply_rotary(v.expand(1, 1, 64, 8), cos, sin)[0, 0] for v in (query, key))
    for distance in (0, 5, 31):
        products = [(queries[p] @ keys[p - distance]).item() for p in range(distance, 64)]
        assert products == pytest.approx([products[0]] * len(products), abs=1e-12)


def test_bf16_inputs_are_rotated_in_fp32_and_rounded_once() -> None:
    x = torch.randn(1, 1, 50, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    table = rotary_table(rotary_frequencies(32, 10000.0, None), 50, torch.float64)
    exact = apply_rotary(x.double(), *table)
    ours = apply_rotary(x, *(part.float() for part in table))
    assert ours.dtype == torch.bfloat16
    assert (ours != exact.bfloat16()).sum() <= 2  # but for values that FP32 puts on the other side of a tie
    assert (ours.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    """The definition, branch by branch (Llama 3 reference code, ``apply_scaling``)."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def test_llama3_scaling() -> None:
    plain = rotary_frequencies(128, 500000.0, None)
    scaled = rotary_frequencies(128, 500000.0, LLAMA3)
    ratios = (scaled / plain).tolist()
    assert scaled.tolist() == pytest.approx([llama3_frequency(f, LLAMA3) for f in plain.tolist()], rel=1e-12)
    assert ratios.count(1.0) == 29  # kept; Llama-3.1's own numbers
    assert sum(ratio == pytest.approx(1 / 8, rel=1e-12) for ratio in ratios) == 29  # stretched
    assert all(1 / 8 <= ratio <= 1 for ratio in ratios)


def test_table_is_exact_at_long_context() -> None:
    """Angles in FP32 would be off by 0.004 at position 131071."""
    cos, _ = rotary_table(rotary_frequencies(2, 10000.0, None), 131072, torch.float32)
    assert cos[131071, 0].item() == pytest.approx(math.cos(131071), abs=1e-7)
