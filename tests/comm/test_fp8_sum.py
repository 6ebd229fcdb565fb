"""FP8 sums: the addition against a table, rings and trees against NumPy and against each other."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.fp8_all_reduce import (
    all_reduce,
    check_native,
    reduce_scatter,
)
from fp8train.comm.fp8_sum import (
    _add_in_fp16,
    add_fp8,
    as_chunks,
    chunk_length,
    count_at_maximum,
    fold_ring,
    fold_tree,
    fold_wide,
)
from fp8train.comm.shared_scale import shared_scales
from fp8train.numerics.cast import amax_of, cast
from fp8train.numerics.formats import dtype_of
from fp8train.precision.number_formats import E4M3, E5M2, Format
from tests.comm import fp8_reference
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE

TABLES = {E4M3: E4M3_TABLE, E5M2: E5M2_TABLE}
FORMATS = [pytest.param(fmt, id=fmt.name) for fmt in TABLES]
WORLD_SIZES = [2, 3, 4, 8]
LENGTHS = [5, 1003, 4096]


def all_pairs(fmt: Format) -> tuple[Tensor, Tensor]:
    code = torch.arange(256, dtype=torch.uint8)
    return code.repeat_interleave(256).view(dtype_of(fmt)), code.repeat(256).view(dtype_of(fmt))


def to_bytes(payload: Tensor) -> np.ndarray:
    return payload.view(torch.uint8).numpy()


def some_codes(world_size: int, length: int, fmt: Format) -> Tensor:
    """Payloads [N, n] of every code, NaN and infinity too."""
    generator = torch.Generator().manual_seed(1000 * world_size + length)
    codes = torch.randint(0, 256, (world_size, length), generator=generator, dtype=torch.uint8)
    return codes.view(dtype_of(fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_pair_of_codes_is_added_as_the_table_says(fmt: Format) -> None:
    a, b = all_pairs(fmt)
    expected = fp8_reference.add(to_bytes(a), to_bytes(b), TABLES[fmt])
    np.testing.assert_array_equal(to_bytes(add_fp8(a, b)), expected)
    arithmetic = _add_in_fp16(a.view(torch.uint8), b.view(torch.uint8), fmt)  # what a GPU computes
    np.testing.assert_array_equal(arithmetic.numpy(), expected)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_nan_code_propagates_and_nothing_else_makes_one(fmt: Format) -> None:
    table = TABLES[fmt]
    a, b = all_pairs(fmt)
    nan = np.isnan(fp8_reference.decode(to_bytes(add_fp8(a, b)), table)).reshape(256, 256)
    nan_codes = [code for code in range(256) if math.isnan(table.decode(code))]
    assert set(nan_codes) >= {0x7F, 0xFF}  # the second one is what a test of 0x7F alone misses
    infinities = [code for code in range(256) if math.isinf(table.decode(code))]
    for i in range(256):
        for j in range(256):
            opposite = i in infinities and j in infinities and i != j
            assert nan[i, j] == (i in nan_codes or j in nan_codes or opposite), (i, j)


@pytest.mark.parametrize("fmt", FORMATS)
def test_fp16_does_not_round_a_sum_of_two_twice(fmt: Format) -> None:
    a, b = all_pairs(fmt)
    with np.errstate(invalid="ignore"):
        exact = fp8_reference.decode(to_bytes(a), TABLES[fmt]) + fp8_reference.decode(
            to_bytes(b), TABLES[fmt]
        )
    np.testing.assert_array_equal(to_bytes(add_fp8(a, b)), fp8_reference.encode(exact, TABLES[fmt]))


def test_sums_saturate_silently() -> None:
    def total(*values: float) -> float:
        terms = torch.tensor(values).to(torch.float8_e4m3fn)
        return float(add_fp8(terms[:1], terms[1:]).float())

    assert total(448.0, 448.0) == 448.0
    assert total(-448.0, -32.0) == -448.0
    assert total(2.0**-9, -(2.0**-9)) == 0.0
    assert total(256.0, 16.0) == 256.0  # half a step: to even
    assert total(256.0, 18.0) == 288.0


def test_operands_must_be_of_one_fp8_format() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="one format"):
        add_fp8(one.to(torch.float8_e4m3fn), one.to(torch.float8_e5m2))
    with pytest.raises(ValueError, match="not an FP8 type"):
        add_fp8(one, one)


@pytest.mark.parametrize("fmt", FORMATS)
def test_saturated_codes_are_counted_by_their_value(fmt: Format) -> None:
    codes = some_codes(1, 4096, fmt)[0]
    at_maximum = np.abs(fp8_reference.decode(to_bytes(codes), TABLES[fmt])) == TABLES[fmt].max
    assert count_at_maximum(codes).item() == int(at_maximum.sum()) > 0


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 13, 64])
def test_folds_equal_the_reference(fmt: Format, world_size: int) -> None:
    codes = some_codes(world_size, 131, fmt)
    for fold, algorithm in ((fold_ring, "ring"), (fold_tree, "tree")):
        expected = fp8_reference.all_reduce(to_bytes(codes), TABLES[fmt], algorithm)
        if world_size == 1:
            expected = to_bytes(codes)[0]  # nothing is added, so no NaN is made canonical
        np.testing.assert_array_equal(to_bytes(fold(codes)), expected, err_msg=algorithm)


def test_a_wide_sum_rounds_once() -> None:
    values = torch.tensor([[-240.0], [256.0], [16.0], [16.0]]).to(torch.float8_e4m3fn)
    assert fold_wide(values).float().item() == 48.0
    assert fold_wide(values, accumulate=torch.float16).float().item() == 48.0
    assert fold_ring(values).float().item() == 16.0  # 256 + 16 is 256, twice: 16 is half a step
    assert fold_wide(values[1:2].repeat(4, 1)).float().item() == 448.0


def test_chunks_are_padded_with_zeros() -> None:
    payload = torch.arange(1, 8, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert as_chunks(payload, 3).tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert as_chunks(payload, 7).data_ptr() == payload.data_ptr()
    assert [chunk_length(n, 4) for n in (0, 1, 4, 5)] == [1, 1, 1, 2]


FOLDS = {"ring": fold_ring, "tree": fold_tree}


def reduce_all(
    group: dist.ProcessGroup, rank: int, world_size: int
) -> dict[tuple[str, str, int], tuple[Tensor, Tensor, dict[str, int]]]:
    """Runs in the pool: (all-reduced, reduce-scattered, bytes sent) of every algorithm, format and length."""
    results = {}
    for name in FOLDS:
        for fmt in TABLES:
            for length in LENGTHS:
                counted = CountedGroup(group)
                mine = some_codes(world_size, length, fmt)[rank]
                whole = all_reduce(mine.clone(), counted, name, purpose="test")()
                chunk = reduce_scatter(mine.clone(), counted, name, purpose="test")()
                results[name, fmt.name, length] = whole, chunk, dict(counted.sent)
    return results


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_gets_the_bits_of_the_fold(gloo_pool, world_size: int) -> None:
    per_rank = gloo_pool.run(reduce_all, world_size)
    for name, fold in FOLDS.items():
        for fmt in TABLES:
            for length in LENGTHS:
                key = (name, fmt.name, length)
                expected = fold(some_codes(world_size, length, fmt)).view(torch.uint8)
                chunks = as_chunks(expected.view(dtype_of(fmt)), world_size)
                reduce_bytes = (world_size - 1) * chunk_length(length, world_size)
                for rank, result in enumerate(per_rank):
                    whole, chunk, sent = result[key]
                    assert torch.equal(whole.view(torch.uint8), expected), (key, rank)
                    inside = min(max(0, length - rank * len(chunk)), len(chunk))
                    got = chunk.view(torch.uint8)
                    assert torch.equal(got[:inside], chunks[rank][:inside]), (key, rank)
                    assert not got[inside:].any(), (key, rank)
                    assert sent == {
                        "all_reduce/test": 2 * reduce_bytes,
                        "reduce_scatter/test": reduce_bytes,
                    }, (key, rank)


def test_one_rank_sends_nothing() -> None:
    alone = CountedGroup(None)
    for name in FOLDS:
        codes = some_codes(1, 77, E4M3)[0]
        whole = all_reduce(codes, alone, name, purpose="x")()
        assert torch.equal(whole.view(torch.uint8), codes.view(torch.uint8))
        chunk = reduce_scatter(codes, alone, name, purpose="x")()
        assert torch.equal(chunk.view(torch.uint8), codes.view(torch.uint8))
    assert not alone.sent


@pytest.mark.parametrize("function", [all_reduce, reduce_scatter])
def test_native_is_refused_without_a_gpu(function) -> None:
    with pytest.raises(ValueError, match="needs CUDA, not cpu; use algorithm 'ring' or 'tree'"):
        function(some_codes(1, 8, E4M3)[0], CountedGroup(None), "native", purpose="x")


@pytest.mark.parametrize(
    ("capability", "version", "message"),
    [((8, 0), (2, 27, 3), "has 8.0"), ((9, 0), (2, 21, 5), "this is 2.21.5"), ((9, 0), (2, 24, 3), None)],
)
def test_native_asks_capability_and_version(monkeypatch, capability, version, message) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    if message is None:
        check_native(torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=message):
        check_native(torch.device("cuda", 0))


def snr_db(got: Tensor, exact: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (got - exact).square().sum()))


@pytest.mark.parametrize("shared_power", [0.02, 0.5])
def test_fewer_roundings_are_more_accurate_at_64_ranks(shared_power: float) -> None:
    N, n = 64, 1 << 15
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N + 1, n, generator=generator, dtype=torch.float64)
    magnitude = (1.5 * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
    mixed = math.sqrt(shared_power) * noise[:1] + math.sqrt(1 - shared_power) * noise[1:]
    gradients = (mixed * magnitude).float()
    scale, scale_inv = shared_scales(amax_of(gradients).reshape(1), torch.tensor([1 / N]), E4M3)
    codes = cast(gradients, E4M3, scale)
    exact = gradients.double().sum(0)
    ring, tree, wide = (
        snr_db(fold(codes).double() * scale_inv, exact) for fold in (fold_ring, fold_tree, fold_wide)
    )
    print(f"SNR at N = {N}, rho = {shared_power}: ring {ring:.1f}, tree {tree:.1f}, wide {wide:.1f} dB")
    assert ring + 4 < tree
    assert tree + 2 < wide
    assert ring < 20
    assert wide > 25
