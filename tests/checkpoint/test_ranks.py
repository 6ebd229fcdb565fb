"""Several ranks (gloo): any layout loads from any other, state is written once, failures are agreed.

Four processes start once and run all scenarios; a scenario that needs two ranks uses ranks 0 and 1.
"""

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fp8train.checkpoint.catalog import find_checkpoint
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.save import save_checkpoint
from fp8train.config.errors import UserError
from fp8train.run_dir.claim import RunDirError
from fp8train.run_dir.directory import RunDir
from tests.checkpoint.loading import load_checkpoint
from tests.free_ports import free_ports

WORLD = 4
WHOLE = torch.arange(10 * 12, dtype=torch.uint8).view(10, 12)


def _rectangle(dtype: torch.dtype, rows: tuple[int, int], cols: tuple[int, int] = (0, 12)) -> LogicalTensor:
    local = WHOLE[slice(*rows), slice(*cols)].contiguous().view(dtype)
    return LogicalTensor(local, (10, 12), (rows[0], cols[0]))


def _blank(like: LogicalTensor) -> LogicalTensor:
    zeros = torch.zeros(like.local.shape, dtype=torch.uint8).view(like.local.dtype)
    return LogicalTensor(zeros, like.global_shape, like.offset)


# Layouts of a 10 x 12 tensor over four ranks; a shard may be empty, ranks may hold the same one.
LAYOUTS: dict[str, list[tuple[tuple[int, int], tuple[int, int]]]] = {
    "whole": [((0, 10), (0, 12))] * 4,
    "rows": [((0, 3), (0, 12)), ((3, 5), (0, 12)), ((5, 8), (0, 12)), ((8, 10), (0, 12))],
    "uneven_rows": [((0, 9), (0, 12)), ((9, 9), (0, 12)), ((9, 10), (0, 12)), ((10, 10), (0, 12))],
    "columns": [((0, 10), (0, 3)), ((0, 10), (3, 6)), ((0, 10), (6, 9)), ((0, 10), (9, 12))],
    "grid": [((0, 5), (0, 6)), ((0, 5), (6, 12)), ((5, 10), (0, 6)), ((5, 10), (6, 12))],
    "replicated_halves": [((0, 5), (0, 12)), ((5, 10), (0, 12))] * 2,
}


def every_layout_from_every_layout(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for saved in LAYOUTS:
            mine = _rectangle(dtype, *LAYOUTS[saved][rank])
            path = _save(root / str(dtype) / saved, {"w": mine}, dist.group.WORLD)
            for wanted in LAYOUTS:
                expected = _rectangle(dtype, *LAYOUTS[wanted][rank])
                target = _blank(expected)
                load_checkpoint(path, {"w": target}, group=dist.group.WORLD)
                assert torch.equal(target.local.view(torch.uint8), expected.local.view(torch.uint8)), (
                    saved,
                    wanted,
                )


def two_ranks_to_one_and_four(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    if rank < 2:
        half = _rectangle(torch.float8_e4m3fn, (5 * rank, 5 * rank + 5))
        _save(root, {"w": half}, pair, rank_state={"rng": torch.tensor([rank, 7])})
    dist.barrier()
    path = root / "step_00000001"
    alone = _blank(_rectangle(torch.float8_e4m3fn, (0, 10)))
    assert load_checkpoint(path, {"w": alone}, group=None).rank_state is None
    assert torch.equal(alone.local.view(torch.uint8), WHOLE)
    quarter = _rectangle(torch.float8_e4m3fn, *LAYOUTS["rows"][rank])
    target = _blank(quarter)
    loaded = load_checkpoint(path, {"w": target}, group=dist.group.WORLD)
    assert loaded.rank_state is None
    assert loaded.world_size == 2
    assert torch.equal(target.local.view(torch.uint8), quarter.local.view(torch.uint8))
    if rank < 2:
        state = load_checkpoint(path, {"w": alone}, group=pair).rank_state
        assert state is not None
        assert state["rng"].tolist() == [rank, 7]


def replicas_are_written_once_and_spread(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    tensors = {f"t{i}": torch.full((25_000,), float(i)) for i in range(8)}  # 100 kB each
    path = _save(root, tensors, dist.group.WORLD)
    sizes = [file.stat().st_size for file in sorted(path.glob("*.distcp"))]
    assert len(sizes) == 4
    assert all(200_000 <= size < 210_000 for size in sizes), sizes


def each_rank_its_own_names(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    path = _save(root, {f"layer.{rank}": torch.full((3,), float(rank))}, dist.group.WORLD)
    other = torch.zeros(3)
    load_checkpoint(path, {f"layer.{3 - rank}": other}, group=dist.group.WORLD)
    assert other.tolist() == [3.0 - rank] * 3


def one_rank_fails_to_write(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    _save(root, {"w": torch.ones(2)}, dist.group.WORLD)

    def fail(phase: str) -> None:
        if rank == 2 and phase == "data":
            raise OSError(28, "No space left on device", "/some/disk")

    shard = LogicalTensor(torch.ones(2), (8,), (2 * rank,))
    with pytest.raises(CheckpointError, match=r"rank 2: .*the disk is full"):
        _save(root, {"w": shard}, dist.group.WORLD, step=2, on_phase=fail)
    dist.barrier()
    assert sorted(entry.name for entry in root.iterdir()) == ["latest", "step_00000001"]
    assert find_checkpoint(root, "auto", group=dist.group.WORLD) == root / "step_00000001"


def rank_zero_fails_to_commit(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    def fail(phase: str) -> None:
        if phase == "rename":
            raise ValueError("a bug")

    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="a bug"):
        _save(root, {"w": torch.ones(2)}, dist.group.WORLD, on_phase=fail)
    dist.barrier()
    assert list(root.iterdir()) == []


def one_rank_has_another_shape(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    path = _save(root, {"w": torch.ones(2), "v": torch.ones(1)}, dist.group.WORLD)
    with pytest.raises(CheckpointError, match=r"w: checkpoint has \(2,\) float32, run has \(3,\) float32"):
        load_checkpoint(
            path, {"w": torch.zeros(3 if rank == 3 else 2), "v": torch.zeros(1)}, group=dist.group.WORLD
        )


def ranks_that_disagree_on_a_tensor_cannot_save(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    with pytest.raises(RuntimeError, match="w: ranks disagree"):
        _save(
            root, {"w": torch.ones(2, dtype=torch.float16 if rank == 1 else torch.float32)}, dist.group.WORLD
        )


def all_ranks_fall_back_together(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    for step in (1, 2):
        _save(root, {"w": torch.arange(100.0)}, dist.group.WORLD, step=step)
    if rank == 0:
        shard = max((root / "step_00000002").glob("*.distcp"), key=lambda file: file.stat().st_size)
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
    dist.barrier()
    assert find_checkpoint(root, "auto", group=dist.group.WORLD) == root / "step_00000001"
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(root / "step_00000002", {"w": torch.zeros(100)}, group=dist.group.WORLD)


def generators_per_rank(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    path = _save(root, {}, dist.group.WORLD, rank_state={"seed": torch.tensor(rank)})
    state = load_checkpoint(path, {}, group=dist.group.WORLD).rank_state
    assert state is not None
    assert state["seed"].item() == rank


def agreement(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    ranks = Ranks(dist.group.WORLD)
    assert ranks.each(lambda: rank * rank) == [0, 1, 4, 9]
    assert ranks.first(lambda: f"from {rank}") == "from 0"
    assert ranks.agree(lambda: rank) == rank
    with pytest.raises(ZeroDivisionError if rank == 1 else RuntimeError):
        ranks.agree(lambda: 1 // (rank - 1))


def run_directory(rank: int, root: Path, pair: dist.ProcessGroup) -> None:
    run = RunDir.open(root, "exp", resume="never", overwrite=False, group=dist.group.WORLD)
    run.log_metrics({"step": 1, "loss": 2.0})
    run.write_status("running", step=1)
    run.log("hello")
    dist.barrier()
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    assert [file.name for file in sorted((run.path / "logs").glob("*.log"))] == [
        f"rank{i}.log" for i in range(4)
    ]
    assert "hello" in run.rank_log.read_text()
    with pytest.raises(RunDirError if rank == 0 else UserError, match="in use by another job"):
        RunDir.open(root, "exp", resume="auto", overwrite=False, group=dist.group.WORLD)
    run.close()


SCENARIOS: dict[str, Callable[[int, Path, dist.ProcessGroup], None]] = {
    scenario.__name__: scenario
    for scenario in (
        every_layout_from_every_layout,
        two_ranks_to_one_and_four,
        replicas_are_written_once_and_spread,
        each_rank_its_own_names,
        one_rank_fails_to_write,
        rank_zero_fails_to_commit,
        one_rank_has_another_shape,
        ranks_that_disagree_on_a_tensor_cannot_save,
        all_ranks_fall_back_together,
        generators_per_rank,
        agreement,
        run_directory,
    )
}


def _save(
    root: Path,
    tensors: dict,
    group: dist.ProcessGroup | None,
    *,
    step: int = 1,
    rank_state: dict[str, torch.Tensor] | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Path:
    return save_checkpoint(
        root, step, tensors, meta={}, rank_state=rank_state or {}, group=group, keep_last=2, on_phase=on_phase
    )


def _worker(rank: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=30),
    )
    pair = dist.new_group([0, 1])
    for name, scenario in SCENARIOS.items():
        try:
            scenario(rank, root / name, pair)
            result = ""
        except Exception:
            result = traceback.format_exc()
        (root / f"{name}.{rank}").write_text(result)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    (port,) = free_ports(1)
    mp.spawn(_worker, args=(port, root), nprocs=WORLD, join=True)
    return root


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(results: Path, scenario: str) -> None:
    for rank in range(WORLD):
        report = (results / f"{scenario}.{rank}").read_text()
        assert report == "", f"rank {rank}:\n{report}"
