"""The controller of μ against the rule in plain Python."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp8train.comm.auto_scale import MuController, initial_mu
from fp8train.comm.collectives import CountedGroup
from fp8train.precision.gradients import Fp8Gradients
from tests.comm.at_once import reduce_at_once
from tests.comm.fp8_reference import next_mu

CPU = torch.device("cpu")
NUMEL = 1_000_000


def controller(
    names: int = 1, world_size: int = 8, initial: float | None = None, **settings: Any
) -> MuController:
    fp8 = Fp8Gradients(reduce="shared_scale", **settings)
    made = MuController([f"w{i}" for i in range(names)], world_size=world_size, device=CPU, settings=fp8)
    if initial is not None:
        made.mu.fill_(initial)
    return made


def counts(*values: int) -> Tensor:
    return torch.tensor(values)


def test_mu_starts_at_one_over_n() -> None:
    assert controller(3).mu.tolist() == [0.125] * 3
    assert controller(mu_initial="one_over_root_ranks").mu.item() == pytest.approx(8**-0.5, rel=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 1000])
def test_where_mu_may_start(ranks: int) -> None:
    """1/N, 1/sqrt(N) and 1, as their names say, and all within the bounds."""
    expected = {"one_over_ranks": 1 / ranks, "one_over_root_ranks": ranks**-0.5, "one": 1.0}
    for name, value in expected.items():
        initial = initial_mu(name, ranks)  # type: ignore[arg-type]
        assert initial == pytest.approx(value, rel=1e-15)
        mus = controller(world_size=ranks, mu_initial=name)
        assert mus.mu.item() == pytest.approx(value, rel=1e-7)
        mus.update(counts(NUMEL), counts(NUMEL))
        assert mus.mu.item() == pytest.approx(value / 2, rel=1e-7)


def test_mu_halves_on_saturation_only_where_it_happens() -> None:
    mus = controller(3, initial=0.5)
    mus.update(counts(11, 10, 0), counts(NUMEL, NUMEL, NUMEL))  # the threshold itself does not halve
    assert mus.mu.tolist() == pytest.approx([0.25, 0.5 * 2**0.001, 0.5 * 2**0.001], rel=1e-7)
    assert mus.mu[0].item() == 0.25


def test_mu_doubles_over_a_thousand_quiet_steps() -> None:
    mus = controller(initial=0.125)
    for _ in range(1000):
        mus.update(counts(0), counts(NUMEL))
    assert mus.mu.item() == pytest.approx(0.25, rel=2e-6)


def test_mu_stays_within_its_bounds() -> None:
    mus = controller(2, world_size=4, mu_window=10)
    for _ in range(40):
        mus.update(counts(NUMEL, 0), counts(NUMEL, NUMEL))
    assert mus.mu.tolist() == [1 / 8, 1.0]


def test_trajectories_follow_the_rule() -> None:
    generator = torch.Generator().manual_seed(3)
    saturated = torch.randint(0, 12, (400, 5), generator=generator)
    saturated[:, 4] = 0
    mus = controller(5, world_size=16)
    expected = [1 / 16] * 5
    for row in saturated:
        mus.update(row, torch.full((5,), NUMEL))
        expected = [next_mu(mu, int(s), NUMEL, 16) for mu, s in zip(expected, row, strict=True)]
        assert mus.mu.tolist() == pytest.approx(expected, rel=2e-6)
    assert len(set(expected)) == 5 or min(expected) == 1 / 32


def test_any_sees_the_one_outlier_that_the_share_does_not() -> None:
    one, numel = counts(1), counts(131_072)
    by_share, by_any = controller(initial=0.5), controller(initial=0.5, mu_criterion="any")
    by_share.update(one, numel)
    by_any.update(one, numel)
    assert by_share.mu.item() > 0.5
    assert by_any.mu.item() == 0.25
    by_any.update(counts(0), numel)
    assert by_any.mu.item() > 0.25


def test_a_step_that_is_not_finite_leaves_mu_alone() -> None:
    mus = controller(3, initial=0.5)
    mus.update(
        counts(NUMEL, NUMEL, 0), counts(NUMEL, NUMEL, NUMEL), finite=torch.tensor([False, True, False])
    )
    assert mus.mu.tolist() == [0.5, 0.25, 0.5]
    mus.update(counts(NUMEL, 0, 0), counts(NUMEL, NUMEL, NUMEL), finite=torch.tensor(False))
    assert mus.mu.tolist() == [0.5, 0.25, 0.5]


def test_an_empty_tensor_is_quiet() -> None:
    mus = controller(initial=0.5)
    mus.update(counts(0), counts(0))
    assert mus.mu.item() == pytest.approx(0.5 * 2**0.001, rel=1e-7)


def test_state_is_restored_in_place() -> None:
    mus, other = controller(2, initial=0.5), controller(2)
    mus.update(counts(NUMEL, 0), counts(NUMEL, NUMEL))
    state = mus.state_tensors()
    assert list(state) == ["mu/w0", "mu/w1"]
    for name, tensor in other.state_tensors().items():
        tensor.copy_(state[name])
    assert torch.equal(other.mu, mus.mu)


def train(
    group: dist.ProcessGroup, rank: int, world_size: int
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Runs in the pool: μ over some steps with all-reduce and with reduce-scatter, and saturated entries."""
    counted = CountedGroup(group)
    names = ["agreeing", "noisy"]
    start = Fp8Gradients(reduce="shared_scale", mu_initial="one")
    whole, sharded = (
        MuController(names, world_size=world_size, device=CPU, settings=start) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(rank)
    numel = torch.tensor([300, 500])
    paths: tuple[list[Tensor], list[Tensor]] = ([], [])
    saturated = []
    for _ in range(6):
        gradients = [torch.full((300,), 3.4), torch.randn(500, generator=generator)]
        reduced = reduce_at_once(gradients, whole.mu, counted)
        whole.update(reduced.saturated, numel)
        chunk = reduce_at_once(gradients, sharded.mu, counted, scatter=True)
        sharded.update(chunk.saturated, numel, sharded_over=counted)
        saturated.append(int(reduced.saturated[0]))
        for path, controller_ in zip(paths, (whole, sharded), strict=True):
            path.append(controller_.mu.clone())
    return *paths, saturated


def test_ranks_and_forms_agree_on_mu_and_saturation_ends(gloo_pool) -> None:
    per_rank = gloo_pool.run(train, 4)
    whole, sharded, saturated = per_rank[0]
    for other in per_rank:
        assert all(torch.equal(a, b) for a, b in zip(other[0], whole, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(other[1], whole, strict=True))
    assert sharded[0].tolist() == [0.5, whole[0][1].item()]
    # 3.4 · 128 = 435 is 448 in E4M3: four of them fit at μ = 1/8, and sit at the maximum above.
    assert [mu[0].item() for mu in whole[:3]] == [0.5, 0.25, 0.125]
    assert saturated[:3] == [300] * 3
    assert saturated[3] == 0
