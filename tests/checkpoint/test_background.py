"""Saving while training goes on: the state at the start is saved, and every rank learns of the outcome."""

import os
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp8train.checkpoint.background import BackgroundSaver
from fp8train.checkpoint.catalog import find_checkpoint, sweep_leftovers
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.ranks import Ranks
from fp8train.checkpoint.readback import describe
from fp8train.checkpoint.retention import Retention
from fp8train.checkpoint.save import Order, save_checkpoint, with_rank_state
from tests.checkpoint.loading import load_checkpoint
from tests.checkpoint.test_faults import small_disk  # noqa: F401 - a fixture
from tests.distributed.pool import GlooPool


def start(
    saver: BackgroundSaver,
    root: Path,
    step: int,
    tensors: dict[str, Any],
    *,
    rank: int = 0,
    rank_state: dict[str, torch.Tensor] | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    held = with_rank_state(tensors, rank_state or {}, rank)
    saver.start(Order(root, step, {"lr": 0.1}, describe(held), Retention(2), on_phase), held)


def test_what_is_saved_is_the_state_when_the_save_began(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(3, 4)
    codes = torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {"across": wide.t(), "codes": codes, "scalar": torch.tensor(7), "empty": torch.zeros(0, 5)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    may_write = threading.Event()
    saver = BackgroundSaver(None)
    generator = torch.tensor([1, 2])
    start(
        saver,
        tmp_path,
        3,
        tensors,
        rank_state={"seed": generator},
        on_phase=lambda phase: may_write.wait(30) and None,
    )
    wide.zero_(), codes.view(torch.uint8).zero_(), tensors["scalar"].zero_(), generator.zero_()
    assert saver.poll() is None
    assert saver.step == 3
    may_write.set()
    written = saver.wait()
    assert written is not None
    assert (written.step, written.path) == (3, tmp_path / "step_00000003")
    assert written.num_bytes == sum(file.stat().st_size for file in written.path.iterdir())
    assert saver.poll() is None
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    state = load_checkpoint(written.path, loaded, group=None).rank_state
    for name, tensor in expected.items():
        assert loaded[name].reshape(-1).tolist() == tensor.reshape(-1).tolist(), name
    assert state is not None
    assert state["seed"].tolist() == [1, 2]


def test_buffers_are_reused_and_counted(tmp_path: Path) -> None:
    saver = BackgroundSaver(None)
    tensors = {"a": torch.ones(100), "b": torch.ones(50, dtype=torch.bfloat16)}
    start(saver, tmp_path, 1, tensors, rank_state={"gauss": torch.zeros(0)})
    saver.wait()
    assert saver.snapshot.num_bytes == 500
    before = [buffer.data_ptr() for buffer in saver.snapshot._buffers.values()]
    tensors["a"].fill_(2)
    start(saver, tmp_path, 2, tensors, rank_state={"gauss": torch.ones(1)})  # may change its shape
    assert [buffer.data_ptr() for buffer in saver.snapshot._buffers.values()] == before
    written = saver.wait()
    assert written is not None
    loaded = {"a": torch.zeros(100), "b": torch.zeros(50, dtype=torch.bfloat16)}
    state = load_checkpoint(written.path, loaded, group=None).rank_state
    assert loaded["a"].tolist() == [2.0] * 100
    assert state is not None and state["gauss"].tolist() == [1.0]
    with pytest.raises(AssertionError, match="a snapshot of other tensors"):
        start(saver, tmp_path, 3, {"a": torch.ones(101), "b": tensors["b"]})


def test_nothing_of_the_process_is_touched(tmp_path: Path) -> None:
    saver = BackgroundSaver(None)  # the one warning filter is set here, in the main thread

    def process_state() -> tuple:
        handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
        return handlers, list(warnings.filters), torch.get_num_threads(), os.getcwd(), dict(os.environ)

    before = process_state()
    during: list[tuple] = []
    threads: list[int] = []

    def look(phase: str) -> None:
        during.append(process_state())
        threads.append(threading.get_ident())

    start(saver, tmp_path, 1, {"a": torch.ones(4)}, on_phase=look)
    saver.wait()
    assert during == [before] * len(during)
    assert len(during) == 6, "begin, one tensor, manifest, rename, pointer, retention"
    assert set(threads) != {threading.get_ident()} and len(set(threads)) == 1
    assert process_state() == before


def test_a_disk_that_fills_up(small_disk: Path) -> None:  # noqa: F811
    root, saver = small_disk / "checkpoints", BackgroundSaver(None)
    tensors = {f"t{i}": torch.ones(20_000) for i in range(6)}
    start(saver, root, 1, tensors)
    saver.wait()
    filler = small_disk / "filler"

    def fill(phase: str) -> None:
        if phase == "data" and not filler.exists():
            command = ["dd", "if=/dev/zero", f"of={filler}", "bs=4k"]
            assert b"No space left" in subprocess.run(command, capture_output=True).stderr

    start(saver, root, 2, tensors, on_phase=fill)
    with pytest.raises(CheckpointError, match="the disk is full; free some space") as caught:
        saver.wait()
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(entry.name for entry in root.iterdir()) == ["latest", "step_00000001"]
    assert (root / "latest").read_text() == "step_00000001\n"
    assert saver.step is None
    filler.unlink()
    start(saver, root, 3, tensors)  # the next one is none the worse
    assert saver.wait() is not None
    assert find_checkpoint(root, "auto") == root / "step_00000003"


@pytest.mark.parametrize("phase", ["begin", "data", "manifest", "rename", "pointer", "retention"])
def test_kill_at_every_phase(tmp_path: Path, phase: str) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(
            root, step, {"x": torch.full((8,), float(step))}, meta={}, rank_state={}, group=None, keep_last=2
        )
    child = os.fork()
    if child == 0:
        try:
            saver = BackgroundSaver(None)
            kill = lambda now: os.kill(os.getpid(), signal.SIGKILL) if now == phase else None  # noqa: E731
            start(saver, root, 3, {"x": torch.full((8,), 3.0)}, on_phase=kill)
            saver.wait()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    sweep_leftovers(root)
    found = find_checkpoint(root, "auto")
    assert found is not None
    assert found.name == ("step_00000003" if phase == "retention" else "step_00000002")
    loaded = torch.zeros(8)
    step = load_checkpoint(found, {"x": loaded}, group=None).step
    assert loaded.tolist() == [float(step)] * 8


def test_a_write_that_hangs_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    never, saver = threading.Event(), BackgroundSaver(None)
    start(saver, tmp_path, 1, {"a": torch.ones(4)}, on_phase=lambda phase: never.wait(60) and None)
    began = time.monotonic()
    assert saver.abandon(grace_s=0.1) is None
    assert time.monotonic() - began < 10
    assert "the checkpoint of step 1 was not saved" in caplog.text
    never.set()  # the next thing it does is to notice that it was broken off
    thread = next((one for one in threading.enumerate() if one.name == "checkpoint"), None)
    if thread is not None:
        thread.join(10)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_ends_in_time_is_kept(tmp_path: Path) -> None:
    saver = BackgroundSaver(None)
    start(saver, tmp_path, 1, {"a": torch.ones(4)}, on_phase=lambda phase: time.sleep(0.02))
    written = saver.abandon(grace_s=60)
    assert written is not None
    assert find_checkpoint(tmp_path, "auto") == written.path


def poll_until_it_ends(saver: BackgroundSaver) -> None:
    """As at step boundaries: all ranks must leave at the same poll, or the next collective hangs."""
    while saver.poll() is None:
        time.sleep(0.01)


def two_ranks(group: dist.ProcessGroup, rank: int, world_size: int, root: Path) -> None:
    saver = BackgroundSaver(group)
    replicated = {f"t{i}": torch.full((25_000,), float(i)) for i in range(8)}
    tensors = {**replicated, "w": LogicalTensor(torch.full((1, 8), rank + 0.5), (2, 8), (rank, 0))}
    state = {"seed": torch.tensor(rank)}
    save_checkpoint(root / "sync", 1, tensors, meta={"lr": 0.1}, rank_state=state, group=group, keep_last=2)
    go = root / "go"

    def slow(phase: str) -> None:
        while rank == 1 and phase == "data" and not go.exists():
            time.sleep(0.01)

    start(saver, root / "async", 1, tensors, rank=rank, rank_state=state, on_phase=slow)
    # Replicas are copied by one rank only: half of 8 x 100 kB each, and its own row of w.
    assert saver.snapshot.num_bytes == 4 * 100_000 + 32
    for number in range(5):  # training's collectives go on while rank 0's writer waits in one of its own
        total = torch.tensor(float(rank + number))
        dist.all_reduce(total, group=group)
        assert total == 2 * number + 1
        assert saver.poll() is None
    dist.barrier(group)
    if rank == 0:
        go.touch()
    assert saver.wait() is not None
    sync, background = root / "sync/step_00000001", root / "async/step_00000001"
    for name in ("__0_0.distcp", "__1_0.distcp", "meta.json"):
        assert (sync / name).read_bytes() == (background / name).read_bytes(), name

    def fail(phase: str) -> None:
        if rank == 1 and phase == "data":
            raise OSError(28, "No space left on device", "/some/disk")

    start(saver, root / "async", 2, tensors, rank=rank, rank_state=state, on_phase=fail)
    message = "rank 1: cannot write .*: /some/disk: the disk is full; free some space"
    with pytest.raises(CheckpointError, match=f"^{message}"):
        poll_until_it_ends(saver)
    polls = torch.ones(1)
    dist.all_reduce(polls, group=group)
    assert polls == 2
    assert saver.step is None
    assert sorted(entry.name for entry in (root / "async").iterdir()) == ["latest", "step_00000001"]
    dist.barrier(group)  # until both have looked: the next save makes a folder of its own

    def bug(phase: str) -> None:
        if rank == 0 and phase == "manifest":
            raise ValueError("a bug")

    start(saver, root / "async", 3, tensors, rank=rank, rank_state=state, on_phase=bug)
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="a bug"):
        saver.wait()
    start(saver, root / "async", 4, tensors, rank=rank, rank_state=state)
    assert saver.wait() is not None
    assert find_checkpoint(root / "async", "auto", group=group) == root / "async/step_00000004"
    assert Ranks(group).each(lambda: saver.step) == [None, None]


def test_two_ranks(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(two_ranks, 2, tmp_path)


def one_rank_leaves(group: dist.ProcessGroup, rank: int, world_size: int, root: Path) -> float:
    """Rank 1 fails in training while rank 0's writer waits for it."""
    saver = BackgroundSaver(group)

    def hang(phase: str) -> None:
        while rank == 1 and phase == "data" and not (root / "over").exists():
            time.sleep(0.01)

    start(
        saver, root / "checkpoints", 1, {"t": torch.ones(100), "u": torch.ones(100)}, rank=rank, on_phase=hang
    )
    began = time.monotonic()
    assert saver.abandon(grace_s=0.5) is None
    return time.monotonic() - began


def test_a_failing_run_does_not_wait_for_the_writers(gloo_pool: GlooPool, tmp_path: Path) -> None:
    assert max(gloo_pool.run(one_rank_leaves, 2, tmp_path)) < 10
    assert find_checkpoint(tmp_path / "checkpoints", "auto") is None
    (tmp_path / "over").touch()
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
