"""Storages of one state: what they keep, against independent arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fp8train.numerics.stochastic import stream_key
from fp8train.optim.make_storage import make_master_storage, make_storage
from fp8train.optim.scaled_formats import ExpandedStorage
from fp8train.optim.state_storage import StatePlace, Storage
from fp8train.precision.number_formats import E4M3
from fp8train.precision.scale_blocks import block_size
from fp8train.precision.state_formats import StateFormat as F

CPU = torch.device("cpu")
KEY = stream_key(3, 5, "exp_avg/w")
SCALED = [
    F(name, granularity=granularity)  # type: ignore[arg-type]
    for name in ("fp16_scaled", "e4m3", "e5m2")
    for granularity in ("block", "tensor")
]
LOSSY = [*SCALED, F("bf16"), F("e4m3", expand=True), F("e5m2", expand=True)]
ROOTS = [
    F("e4m3", sqrt=True),
    F("fp16_scaled", granularity="tensor", sqrt=True),
    F("e4m3", expand=True, sqrt=True),
]
# Largest relative error of a value that stays normal: half a unit in the last place, to nearest.
HALF_ULP = {"bf16": 2.0**-8, "fp16_scaled": 2.0**-11, "e4m3": 2.0**-4, "e5m2": 2.0**-3}


def storage_of(fmt: F, shape: tuple[int, ...], offset: int = 0) -> Storage:
    return make_storage(
        fmt, StatePlace(shape, block_size(shape[-1], fmt.block), offset, CPU), wide=torch.float32
    )


def fill(storage: Storage, values: Tensor, key: int | None = None, chunk: int | None = None) -> None:
    flat = values.reshape(-1)
    chunk = chunk or len(flat)
    if storage.two_pass:
        storage.begin(flat.abs().max())
    for start in range(0, len(flat), chunk):
        stop = min(start + chunk, len(flat))
        storage.store(start, stop, flat[start:stop].clone(), key)
    if storage.two_pass:
        storage.end()


def read(storage: Storage) -> Tensor:
    return storage.load(0, storage.place.numel).view(storage.place.shape).clone()


def moments(shape: tuple[int, ...], sigma: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(17)
    magnitude = torch.exp(sigma * torch.randn(shape, generator=generator)) * 1e-5
    return magnitude * torch.randn(shape, generator=generator).sign()


@pytest.mark.parametrize("fmt", LOSSY, ids=str)
@pytest.mark.parametrize("shape", [(16, 256), (12, 192), (64, 131)])
def test_to_nearest_the_error_is_half_a_unit(fmt: F, shape: tuple[int, ...]) -> None:
    x = moments(shape, sigma=0.5)  # within 10 binades of each other: nothing is subnormal but in expansion
    storage = storage_of(fmt, shape)
    fill(storage, x)
    error = ((read(storage) - x) / x).abs()
    assert float(error.max()) <= HALF_ULP[fmt.format] * (1 + 1e-3)
    if fmt.expand:  # a block spans about 6 binades of the format's 17 or 31: k is well above 1
        assert float(error.square().mean().sqrt()) < {"e4m3": 0.015, "e5m2": 0.018}[fmt.format]


@pytest.mark.parametrize("fmt", SCALED, ids=str)
def test_scaled_codes_follow_the_definition(fmt: F) -> None:
    """Payload = value · 2^k rounded by torch's own cast, k from math.log2."""
    x = moments((4, 256), sigma=2.0)
    storage = storage_of(fmt, (4, 256))
    fill(storage, x)
    largest = {"fp16_scaled": 57344.0, "e4m3": 448.0, "e5m2": 57344.0}[fmt.format]
    groups = x.view(-1, 128) if fmt.granularity == "block" else x.view(1, -1)
    payload = storage.tensors()[".payload"].view(groups.shape)
    for group, codes in zip(groups, payload, strict=True):
        k = math.floor(math.log2(largest / float(group.abs().max())))
        assert torch.equal((group.double() * 2.0**k).float().to(codes.dtype).float(), codes.float())


@pytest.mark.parametrize("fmt", [*LOSSY, *ROOTS], ids=str)
def test_zeros_stay_zeros_with_scale_one(fmt: F) -> None:
    storage = storage_of(fmt, (4, 256))
    fill(storage, moments((4, 256)).abs())
    x = moments((4, 256)).abs()
    x[1] = 0.0  # two blocks of zeros
    x[2, ::3] = 0.0  # blocks with zeros in them
    for values in (x, torch.zeros(4, 256)):
        for key in (None, KEY):
            fill(storage, values, key)
            stored = read(storage)
            assert torch.isfinite(stored).all()
            assert bool((stored[values == 0] == 0).all())
    for suffix, tensor in storage.tensors().items():
        if suffix in (".scale", ".scale_inv", ".amax"):
            assert bool((tensor == (127 if suffix == ".scale" else 1)).all())


def test_a_zero_does_not_collapse_the_expanded_range() -> None:
    """COAT's k fell from 1.56 to 0.19 where a block held a zero."""
    x = moments((4, 256))
    with_zeros = x.clone()
    with_zeros[:, ::64] = 0.0
    storages = [ExpandedStorage(StatePlace((4, 256), 128, 0, CPU), E4M3) for _ in range(2)]
    for storage, values in zip(storages, (x, with_zeros), strict=True):
        fill(storage, values)
    powers = [storage.power.float() / 16 for storage in storages]
    assert float(powers[0].min()) > 1.0
    assert float(((powers[0] - powers[1]) / powers[0]).abs().max()) < 0.2
    kept = with_zeros != 0
    errors = [((read(s) - x)[kept] / x[kept]).square().mean().sqrt() for s in storages]
    assert float(errors[1]) < 1.1 * float(errors[0])


def test_expansion_spans_what_blocks_flush() -> None:
    """40 binades in a block, amax 1: E4M3 flushes below 2^-10 / 2^8, with k = 1/2 below (2^-10 / 448)^2."""
    x = torch.exp2(-torch.arange(128) * (40 / 128)).repeat(2, 1)
    flushed = {}
    for fmt in (F("e4m3"), F("e4m3", expand=True)):
        storage = storage_of(fmt, (2, 128))
        fill(storage, x)
        flushed[fmt.expand] = float((read(storage) == 0).float().mean())
    assert flushed[False] == pytest.approx(1 - 18 / 40, abs=0.02)
    assert flushed[True] == pytest.approx(1 - 37.6 / 40, abs=0.02)


def test_remainder_is_fp32_exactly_and_the_weight_is_the_nearest() -> None:
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator, dtype=torch.int64).to(torch.int32)
    bits[:4096] = (bits[:4096] & ~0xFFFF) | 0x8000  # exact ties
    x = bits.view(torch.float32)
    x = torch.where(torch.isfinite(x) & (x.abs() < 3e38), x, 1.0)[None]
    weight = torch.zeros(1, 1 << 16, dtype=torch.bfloat16)
    storage = make_master_storage(
        F("bf16_remainder"), StatePlace((1, 1 << 16), 1, 0, CPU), wide=torch.float32, weight=weight
    )
    storage.store(0, 1 << 16, x.view(-1), None)
    assert torch.equal(read(storage).view(torch.int32), x.view(torch.int32))
    assert storage.tensors()[".weight"].data_ptr() == weight.data_ptr()
    assert storage.nbytes == 4 << 16
    error = (weight.double() - x.double()).abs()
    assert bool((error <= (x.to(torch.bfloat16).double() - x.double()).abs()).all())
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~ties], x.to(torch.bfloat16)[~ties])


@pytest.mark.parametrize("fmt", [*LOSSY, *ROOTS], ids=str)
@pytest.mark.parametrize("shape", [(24, 192), (128, 131)])
def test_bits_do_not_depend_on_the_cut(fmt: F, shape: tuple[int, ...]) -> None:
    """Chunks, and shards of rows with their offset: the codes of the whole."""
    x = moments(shape).abs()
    whole, pieces = storage_of(fmt, shape), storage_of(fmt, shape)
    fill(whole, x, KEY)
    unit = whole.place.unit
    assert unit < x.numel()
    fill(pieces, x, KEY, chunk=unit)
    for suffix, tensor in whole.tensors().items():
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), pieces.tensors()[suffix].view(-1).view(torch.uint8)
        )
    if whole.two_pass:
        return  # one scale for all rows has to be agreed first
    half = shape[0] // 2
    shards = [storage_of(fmt, (half, shape[1]), offset) for offset in (0, half * shape[1])]
    for shard, rows in zip(shards, (x[:half], x[half:]), strict=True):
        fill(shard, rows, KEY)
    for suffix, tensor in whole.tensors().items():
        joined = torch.cat([shard.tensors()[suffix].view(torch.uint8) for shard in shards])
        assert torch.equal(tensor.view(torch.uint8), joined)


@pytest.mark.parametrize("fmt", LOSSY, ids=str)
def test_stochastic_rounding_is_reproducible_and_right_on_average(fmt: F) -> None:
    row = moments((1, 128), sigma=0.5)
    row[0, 0] = 2.0**-14  # amax, exact in every format
    x = row.repeat(2048, 1)
    storage, again = storage_of(fmt, tuple(x.shape)), storage_of(fmt, tuple(x.shape))
    fill(storage, x, KEY)
    fill(again, x, KEY)
    assert torch.equal(read(storage), read(again))
    fill(again, x, stream_key(3, 6, "exp_avg/w"))
    assert float((read(storage) != read(again)).float().mean()) > 0.1
    bias = (read(storage).double().mean(dim=0) / row.double() - 1).abs().max()
    # 2048 draws, each off by at most two half units: 4.5 standard deviations; the expanded range has a bias
    assert float(bias) < HALF_ULP[fmt.format] * (0.11 if not fmt.expand else 0.2)


def test_bytes_per_element() -> None:
    expected = {
        F(): 4.0,
        F("bf16"): 2.0,
        F("fp16_scaled"): 2 + 1 / 128,
        F("fp16_scaled", granularity="tensor"): 2.0,
        F("e4m3"): 1 + 1 / 128,
        F("e5m2", block=64): 1 + 1 / 64,
        F("e4m3", granularity="tensor"): 1.0,
        F("e4m3", sqrt=True): 1 + 1 / 128,
        F("e4m3", expand=True): 1 + 5 / 128,
        F("bf16_remainder"): 4.0,
    }
    shape = (512, 1024)
    for fmt, size in expected.items():
        assert storage_of(fmt, shape).nbytes / (512 * 1024) == pytest.approx(size, abs=1e-5), str(fmt)
