"""The shared-scale reduction against Equations 3 to 6 written in NumPy, and the defects it must not have."""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.collectives import CountedGroup
from fp8train.comm.shared_scale import (
    ReducedBucket,
    SharedScaleReduction,
    shared_scales,
)
from fp8train.precision.number_formats import E4M3, E5M2, Format
from tests.comm import fp8_reference
from tests.comm.at_once import reduce_at_once
from tests.numerics.fp8_table import E4M3_TABLE, E5M2_TABLE, Table

WORLD_SIZES = [2, 4, 8]
TABLES: dict[Format, Table] = {E4M3: E4M3_TABLE, E5M2: E5M2_TABLE}
SHAPES = [(17, 5), (64,), (3, 3, 7), (1,)]
ALGORITHMS = ["ring", "tree"]


def random_bucket(rank: int, world_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Heavy-tailed gradients; tensors and ranks of different size."""
    generator = torch.Generator().manual_seed(100 * world_size + rank)
    bucket = []
    for t, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(1.5).exp()
        bucket.append((x * 10.0 ** (2 * t - 4) * 1.3**rank).to(dtype))
    return bucket


def factors(world_size: int) -> Tensor:
    """A different μ for each tensor: none, safe, any, and a bound."""
    return torch.tensor([1.0, 1 / world_size, 0.3, 1 / (2 * world_size)])


def special_bucket(rank: int, world_size: int) -> dict[str, Tensor]:
    """One tensor for each case below."""
    generator = torch.Generator().manual_seed(rank)
    ordinary = torch.randn(40, generator=generator)
    last = rank == world_size - 1
    small = torch.full((40,), 2.0**-20)
    inf, nan = ordinary.clone(), ordinary.clone()
    if last:
        inf[3] = -torch.inf
    if rank == 0:
        nan[5] = torch.nan
    return {
        "inf_on_one_rank": inf,
        "nan_on_one_rank": nan,
        "zero": torch.zeros(40),
        "zero_but_on_one_rank": small if last else torch.zeros(40),
        "large_on_one_rank": torch.full((40,), 7.0) if last else small,
        "above_448": torch.full((40,), 1000.0),
        "alike": torch.full((40,), 3.5),
        "alike_with_room": torch.full((40,), 3.5),
        "tiny": torch.full((40,), 1e-42),
        "huge": torch.full((40,), 3e38 / world_size),
    }


def special_factors(world_size: int) -> Tensor:
    names = list(special_bucket(0, world_size))
    mu = {"alike": 1.0, "huge": 1 / (2 * world_size)}
    return torch.tensor([mu.get(name, 1 / world_size) for name in names])


def exact_bucket(rank: int) -> list[Tensor]:
    """Small integers over powers of two: every partial sum of up to 8 ranks is an E4M3 value, scaled."""
    generator = torch.Generator().manual_seed(rank)
    integers = torch.randint(-1, 2, (96,), generator=generator).float()
    integers[:2] = torch.tensor([1.0, -1.0])
    return [integers * 2.0**-11, integers.flip(0) * 2.0**9]


def plain(bucket: ReducedBucket) -> dict[str, object]:
    """For the way back from the pool."""
    return {name: getattr(bucket, name) for name in ReducedBucket.__dataclass_fields__}


def reduce_everything(group: dist.ProcessGroup, rank: int, world_size: int) -> dict[str, object]:
    """Runs in the pool: every case, to start the ranks once."""
    results: dict[str, object] = {}
    mus = factors(world_size)
    for algorithm in ALGORITHMS:
        for fmt in TABLES:
            for dtype in (torch.float32, torch.bfloat16):
                key = f"{algorithm}/{fmt.name}/{dtype}"
                reduce = functools.partial(
                    reduce_at_once, random_bucket(rank, world_size, dtype), mus, fmt=fmt
                )
                counted = CountedGroup(group)
                results[key] = plain(reduce(counted, algorithm=algorithm))
                results[f"{key}/sent"] = dict(counted.sent)
        results[f"{algorithm}/mean"] = plain(
            reduce_at_once(
                random_bucket(rank, world_size, torch.float32),
                mus,
                CountedGroup(group),
                algorithm=algorithm,
                average=True,
            )
        )
        counted = CountedGroup(group)
        results[f"{algorithm}/scatter"] = plain(
            reduce_at_once(
                random_bucket(rank, world_size, torch.float32),
                mus,
                counted,
                algorithm=algorithm,
                scatter=True,
            )
        )
        results[f"{algorithm}/scatter/sent"] = dict(counted.sent)
        safe = torch.full((2,), 1 / world_size)
        mean = reduce_at_once(
            exact_bucket(rank), safe, CountedGroup(group), algorithm=algorithm, average=True
        )
        results[f"{algorithm}/exact"] = plain(mean)
    specials = list(special_bucket(rank, world_size).values())
    results["special"] = plain(reduce_at_once(specials, special_factors(world_size), CountedGroup(group)))
    results["overlapped"] = [plain(bucket) for bucket in overlapped(CountedGroup(group), rank)]
    return results


def overlapped(group: CountedGroup, rank: int) -> list[ReducedBucket]:
    """Two buckets as a gradient store moves them: the second starts before the first is sent."""
    mus, bf16 = factors(group.size), torch.bfloat16
    gradients = [random_bucket(rank, group.size, torch.float32), random_bucket(rank, group.size, bf16)]
    first, second = (SharedScaleReduction(bucket, mus, group) for bucket in gradients)
    first.start()
    second.start()
    first.send()
    for gradient in gradients[0]:
        gradient.fill_(torch.nan)  # free after send
    second.send()
    return [first.finish(), second.finish()]


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda n: f"ranks{n}")
def per_rank(gloo_pool, request: pytest.FixtureRequest) -> list[dict]:
    return gloo_pool.run(reduce_everything, request.param)


def codes(result: dict) -> np.ndarray:
    return result["codes"].view(torch.uint8).numpy()


def tensor_values(result: dict, index: int) -> Tensor:
    return ReducedBucket(**result).values(index)


def special(per_rank: list[dict], name: str) -> tuple[list[Tensor], int]:
    """(values of a special tensor on each rank, its index)."""
    index = list(special_bucket(0, 2)).index(name)
    return [tensor_values(result["special"], index) for result in per_rank], index


def numpy_bucket(world_size: int, dtype: torch.dtype) -> list[list[np.ndarray]]:
    return [[g.float().numpy() for g in random_bucket(r, world_size, dtype)] for r in range(world_size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fmt", [pytest.param(fmt, id=fmt.name) for fmt in TABLES])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_codes_and_scales_are_those_of_the_equations(per_rank, algorithm, fmt, dtype) -> None:
    N = len(per_rank)
    expected, scales = fp8_reference.reduce_bucket(
        numpy_bucket(N, dtype), factors(N).tolist(), TABLES[fmt], algorithm
    )
    for result in per_rank:
        got = result[f"{algorithm}/{fmt.name}/{dtype}"]
        np.testing.assert_array_equal(codes(got), expected)
        assert got["scale_inv"].tolist() == [1 / s for s in scales]  # FP32 divisions
        begin = 0
        for index, shape in enumerate(SHAPES):  # the count against brute force on values
            part = fp8_reference.decode(expected[begin : begin + int(np.prod(shape))], TABLES[fmt])
            begin += part.size
            assert got["saturated"][index].item() == int((np.abs(part) == TABLES[fmt].max).sum())


def test_the_paper_casts_twice_to_the_same_codes() -> None:
    """Eq. 5 as printed: g' is FP8 with the rank's own scale before it meets the shared one."""
    generator = np.random.default_rng(0)
    gradients = [generator.standard_normal(4096).astype(np.float32) * 3.0**r for r in range(4)]
    ours, s = fp8_reference.shared_scale(gradients, 0.25, E4M3_TABLE)
    for g, direct in zip(gradients, ours, strict=True):
        own = np.float32(fp8_reference.local_scale(g, E4M3_TABLE)) * np.float32(0.25)
        g_prime = fp8_reference.decode(
            fp8_reference.encode((g * own).astype(np.float64), E4M3_TABLE), E4M3_TABLE
        )
        twice = fp8_reference.encode(g_prime / own * s, E4M3_TABLE)
        normal = np.abs(fp8_reference.decode(direct, E4M3_TABLE)) > 2.0**-6
        np.testing.assert_array_equal(twice[normal], direct[normal])
        assert normal.mean() > 0.9


def test_the_mean_is_the_sum_with_another_scalar(per_rank) -> None:
    for algorithm in ALGORITHMS:
        for result in per_rank:
            total, mean = result[f"{algorithm}/e4m3/torch.float32"], result[f"{algorithm}/mean"]
            np.testing.assert_array_equal(codes(mean), codes(total))
            assert torch.equal(mean["scale_inv"] * len(per_rank), total["scale_inv"])  # N is a power of two


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_averaging_is_exact_on_representable_inputs(per_rank, algorithm: str) -> None:
    buckets = [exact_bucket(rank) for rank in range(len(per_rank))]
    for index in range(2):
        expected = torch.stack([bucket[index] for bucket in buckets]).mean(0)
        assert expected.abs().max() > 0
        for result in per_rank:
            assert torch.equal(tensor_values(result[f"{algorithm}/exact"], index), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reduce_scatter_gives_each_rank_its_part_of_the_all_reduce(per_rank, algorithm: str) -> None:
    whole = per_rank[0][f"{algorithm}/e4m3/torch.float32"]
    total = len(codes(whole))
    seen = [[] for _ in SHAPES]
    for rank, result in enumerate(per_rank):
        part = ReducedBucket(**result[f"{algorithm}/scatter"])
        length = -(-total // len(per_rank))
        assert (len(part.codes), part.offset) == (length, rank * length)
        expected = codes(whole)[part.offset : part.offset + length]
        np.testing.assert_array_equal(part.codes.view(torch.uint8)[: len(expected)], expected)
        assert torch.equal(part.scale_inv, whole["scale_inv"])
        for index in range(len(SHAPES)):
            here = part.payload(index)
            if len(here):
                assert part.starts[index] == sum(len(piece) for piece in seen[index])
            seen[index].append(here.view(torch.uint8))
    for index in range(len(SHAPES)):
        begin, end = whole["bounds"][index]
        np.testing.assert_array_equal(torch.cat(seen[index]), codes(whole)[begin:end])
    counts = torch.stack([result[f"{algorithm}/scatter"]["saturated"] for result in per_rank])
    assert torch.equal(counts.sum(0), whole["saturated"])


def test_bytes_are_those_of_the_ring_and_one_scalar_per_tensor(per_rank) -> None:
    N = len(per_rank)
    n = sum(int(np.prod(shape)) for shape in SHAPES)
    padded = -(-n // N) * N
    scales = 2 * 4 * len(SHAPES) * (N - 1) // N
    for result in per_rank:
        for algorithm in ALGORITHMS:
            assert result[f"{algorithm}/e4m3/torch.float32/sent"] == {
                "all_reduce/gradient": 2 * padded * (N - 1) // N,
                "all_reduce/gradient_scale": scales,
            }
            assert result[f"{algorithm}/scatter/sent"] == {
                "reduce_scatter/gradient": padded * (N - 1) // N,
                "all_reduce/gradient_scale": scales,
            }


def test_overlapped_buckets_do_not_mix(per_rank) -> None:
    for result in per_rank:
        for got, dtype in zip(result["overlapped"], (torch.float32, torch.bfloat16), strict=True):
            expected = result[f"ring/e4m3/{dtype}"]
            np.testing.assert_array_equal(codes(got), codes(expected))
            assert torch.equal(got["scale_inv"], expected["scale_inv"])


@pytest.mark.parametrize("name", ["inf_on_one_rank", "nan_on_one_rank"])
def test_a_rank_that_is_not_finite_marks_the_tensor_on_all(per_rank, name: str) -> None:
    values, index = special(per_rank, name)
    for rank, result in enumerate(per_rank):
        bucket = ReducedBucket(**result["special"])
        assert bucket.scale_inv[index].isnan()
        assert values[rank].isnan().all()
        assert bucket.finite.tolist() == [
            not other.startswith(("inf", "nan")) for other in special_bucket(0, 2)
        ]


def test_zero_tensors_stay_zero_with_scale_one(per_rank) -> None:
    values, index = special(per_rank, "zero")
    for rank, result in enumerate(per_rank):
        assert result["special"]["scale_inv"][index].item() == len(per_rank)  # scale 1 · μ
        assert not values[rank].any()


def test_a_zero_rank_has_no_say_in_the_scale(per_rank) -> None:
    values, _ = special(per_rank, "zero_but_on_one_rank")
    for value in values:
        assert torch.equal(value, torch.full((40,), 2.0**-20))


def test_the_largest_rank_sets_the_scale(per_rank) -> None:
    values, index = special(per_rank, "large_on_one_rank")
    for rank, result in enumerate(per_rank):
        assert result["special"]["scale_inv"][index].item() == len(per_rank) / 64  # 7 · 64 = 448, times μ
        assert torch.equal(values[rank], torch.full((40,), 7.0))


def test_mu_makes_payloads_smaller_also_above_448(per_rank) -> None:
    """Where the scale is below 1 a factor applied to its reciprocal would make them larger."""
    N = len(per_rank)
    values, index = special(per_rank, "above_448")
    for rank, result in enumerate(per_rank):
        assert result["special"]["scale_inv"][index].item() == 4 * N  # 1000 / 4 = 250, times μ
        assert torch.equal(values[rank], torch.full((40,), 1024.0 * N))  # 250 / N is 256 / N in E4M3
        assert result["special"]["saturated"][index] == 0


def test_an_overflowing_sum_is_counted_and_mu_prevents_it(per_rank) -> None:
    N = len(per_rank)
    values, index = special(per_rank, "alike")
    safe, safe_index = special(per_rank, "alike_with_room")
    for rank, result in enumerate(per_rank):
        assert result["special"]["saturated"][index].item() == 40
        assert torch.equal(values[rank], torch.full((40,), 3.5))  # the sum should be 3.5 · N
        # 448 / N per rank adds up to 448: rightly at the maximum, and exact where no sum on the way rounds.
        assert result["special"]["saturated"][safe_index].item() == 40
        assert torch.equal(safe[rank], torch.full((40,), 3.5 * N))


@pytest.mark.parametrize("name", ["tiny", "huge"])
def test_scales_at_the_ends_of_fp32_stay_finite(per_rank, name: str) -> None:
    values, index = special(per_rank, name)
    for rank, result in enumerate(per_rank):
        assert result["special"]["scale_inv"][index].isfinite()
        assert values[rank].isfinite().all()


def test_the_scale_itself_is_never_infinite_or_nan() -> None:
    amax = torch.tensor([0.0, 1e-45, 1e-38, 1.0, 448.0, 449.0, 3.4e38, torch.inf, torch.nan])
    for mu in (1.0, 0.3, 2.0**-11):
        scale, scale_inv = shared_scales(amax, torch.full_like(amax, mu), E4M3)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert scale_inv.isnan().tolist() == [False] * 7 + [True] * 2
        assert (scale_inv[:7] > 0).all()
        assert scale_inv[:7].isfinite().all()
        assert (amax[:7] * scale[:7] <= 448.0).all()
    assert shared_scales(torch.tensor([448.0]), torch.tensor([0.25]), E4M3)[0].item() == 0.25


def test_one_rank_reduces_by_itself() -> None:
    gradient = torch.tensor([1.0, -2.0, 7.0])
    for scatter in (False, True):
        alone = CountedGroup(None)
        bucket = reduce_at_once(
            [gradient, torch.empty(0)], torch.ones(2), alone, average=True, scatter=scatter
        )
        assert torch.equal(bucket.values(0), gradient)
        assert bucket.payload(1).numel() == 0
        assert bucket.saturated.tolist() == [1, 0]
        assert not alone.sent


def test_bad_arguments_are_refused() -> None:
    alone, gradients = CountedGroup(None), [torch.ones(3), torch.ones(2)]
    with pytest.raises(ValueError, match="at least one gradient"):
        reduce_at_once([], torch.ones(0), alone)
    with pytest.raises(ValueError, match=r"2 gradients need float32 \(2,\)"):
        reduce_at_once(gradients, torch.ones(3), alone)
    with pytest.raises(ValueError, match=r"mus: torch.float64"):
        reduce_at_once(gradients, torch.ones(2).double(), alone)
    with pytest.raises(ValueError, match="algorithm: 'star'; legal: ring, tree, native"):
        reduce_at_once(gradients, torch.ones(2), alone, algorithm="star")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs CUDA"):
        reduce_at_once(gradients, torch.ones(2), alone, algorithm="native")
