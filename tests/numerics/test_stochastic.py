"""Stochastic rounding: unbiased, between the right neighbours, independent of how a tensor is cut."""

from __future__ import annotations

import pytest
import torch

from fp8train.numerics.stochastic import cast_stochastic, random_bits, round_stochastic, stream_key
from fp8train.precision.number_formats import E4M3, E5M2

CPU = torch.device("cpu")
TARGETS = {
    "fp16": (torch.float16, 10, -14),
    "bf16": (torch.bfloat16, 7, -126),
    "e4m3": (torch.float8_e4m3fn, 3, -6),
    "e5m2": (torch.float8_e5m2, 2, -14),
}


def test_bits_are_uniform_and_do_not_depend_on_the_cut() -> None:
    key = stream_key(1, 2, "layers.0.mlp.up.weight")
    whole = random_bits(key, 0, 1 << 16, CPU)
    parts = torch.cat([random_bits(key, start, 1 << 12, CPU) for start in range(0, 1 << 16, 1 << 12)])
    assert torch.equal(whole, parts)
    for bit in range(32):  # 2^16 draws: the standard deviation of the mean is 0.002
        assert abs(float(((whole >> bit) & 1).float().mean()) - 0.5) < 0.01, bit
    pairs = (whole[1:] & 0xFF) * 256 + (whole[:-1] & 0xFF)
    assert len(pairs.unique()) > 0.6 * len(pairs)  # 1 - 1/e of them for independent bytes
    others = [stream_key(1, 3, "layers.0.mlp.up.weight"), stream_key(2, 2, "layers.0.mlp.up.weight")]
    for other in others:
        assert float((random_bits(other, 0, 1 << 16, CPU) == whole).float().mean()) < 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_rounding_is_to_a_neighbour_and_right_on_average(target: str) -> None:
    dtype, mantissa_bits, min_exponent = TARGETS[target]
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(64, generator=generator) * torch.exp2(torch.linspace(min(-12, 3), 3, 64))
    if min_exponent > -126:
        values[:16] *= 2.0 ** (min_exponent - 2)  # subnormal in the target
    draws = 4096
    x = values[:, None].expand(-1, draws).contiguous()
    bits = random_bits(stream_key(0, 0, target), 0, x.numel(), CPU).view(x.shape)
    rounded = round_stochastic(x, mantissa_bits, min_exponent, bits)
    assert torch.equal(rounded.to(dtype).float(), rounded), "not representable"
    exponent = torch.floor(torch.log2(values.abs())).clamp(min=min_exponent)
    spacing = torch.exp2(exponent - mantissa_bits)[:, None]
    assert bool(((rounded - x).abs() < spacing).all())
    error = (rounded.double().mean(dim=1) - values.double()).abs() / spacing[:, 0]
    assert float(error.max()) < 0.04  # 5 standard deviations of a mean of 4096 draws


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_the_cast_never_leaves_the_format(fmt) -> None:
    x = torch.tensor([fmt.max, -fmt.max, fmt.max * 0.999, 2 * fmt.max, 0.0, -0.0])
    for start in range(0, 6000, 6):
        payload = cast_stochastic(x, fmt, torch.tensor(1.0), random_bits(7, start, 6, CPU))
        assert torch.isfinite(payload.float()).all()
        assert float(payload.float().abs().max()) == fmt.max
        assert payload.float()[4:].tolist() == [0.0, 0.0]


def test_exact_values_do_not_move() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = x[torch.isfinite(x)]
    payload = cast_stochastic(x, E4M3, torch.tensor(1.0), random_bits(3, 0, len(x), CPU))
    assert torch.equal(payload.float(), x)
