"""Failed allocations, in the words that torch really uses, become advice."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8train.training.memory import explain, is_out_of_memory, keep_snapshot
from tests.training.tiny import tiny_config

CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.06 "
    "GiB is free. Including non-PyTorch memory, this process has 76.04 GiB memory in use."
)

LEVEL = "keep states in fewer bits with precision.level: O2 (O0), "
SPLIT = "split the model further with parallel.tp (1) or parallel.pp (1), or take a smaller model"
OFFLOAD = "keep the optimizer's states in host memory with optimizer.offload: cpu, "


def test_allocations_beyond_the_address_space_are_known() -> None:
    for allocate in (lambda: torch.empty(2**50), lambda: np.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_cpu_allocator_is_quoted_in_bytes() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float32)
    text = str(explain(caught.value, tiny_config(), rank=1, dp=1, step=None))
    first, second = text.splitlines()
    peak = re.fullmatch(
        r"rank 1 ran out of CPU memory before the first step, asking for 4096 TiB; the most it ever held: "
        r"([\d.]+) ([MG])iB",
        first,
    )
    assert peak is not None, first
    held = float(peak[1]) * {"M": 2**20, "G": 2**30}[peak[2]]
    assert 50e6 < held < 100e9  # of a process that has imported torch
    assert second == f"{LEVEL}{SPLIT}"


def test_numpy_says_what_it_asked_for() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(2**50)
    assert "asking for 8.00 PiB" in str(explain(caught.value, tiny_config(), rank=0, dp=1, step=None))


@pytest.mark.parametrize(
    ("overrides", "dp", "advice"),
    [
        (
            ["train.micro_batch_size=4"],
            2,
            "lower train.micro_batch_size (4), recompute with train.activation_checkpointing: selective or "
            f"full, share the optimizer's states with parallel.zero: 1, {OFFLOAD}",
        ),
        (
            ["train.activation_checkpointing=selective"],
            1,
            f"recompute with train.activation_checkpointing: full, {OFFLOAD}",
        ),
        (["train.activation_checkpointing=full", "parallel.zero=1"], 2, OFFLOAD),
        (["train.activation_checkpointing=full", "parallel.zero=1", "optimizer.offload=cpu"], 2, ""),
    ],
)
def test_advice_leaves_out_what_is_done_already(overrides: list[str], dp: int, advice: str) -> None:
    error = explain(torch.OutOfMemoryError(CUDA), tiny_config(overrides), rank=0, dp=dp, step=7)
    first, second = str(error).splitlines()
    assert first == "rank 0 ran out of GPU memory in step 7, asking for 20.50 GiB"
    assert second == advice + LEVEL + SPLIT
    assert error.exit_status == 2


class FakeAllocator:
    """Stands in for ``torch.cuda.memory``."""

    def __init__(self, split: int, disk: OSError | None = None) -> None:
        self.split, self.disk = split, disk

    def memory_stats(self) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": 60 * 2**30,
            "allocated_bytes.all.peak": 70 * 2**30,
            "reserved_bytes.all.current": 76 * 2**30,
            "inactive_split_bytes.all.current": self.split * 2**30,
        }

    def mem_get_info(self) -> tuple[int, int]:
        return 3 * 2**30, 79 * 2**30

    def memory_summary(self) -> str:
        return "the table"

    def _dump_snapshot(self, path: str) -> None:
        if self.disk is not None:
            raise self.disk
        Path(path).write_bytes(b"snapshot")


@pytest.mark.parametrize(("split", "said", "in_pieces"), [(2, "2.00", False), (16, "16.0", True)])
def test_what_a_gpu_held_is_told_and_kept(tmp_path: Path, split: int, said: str, in_pieces: bool) -> None:
    log: list[str] = []
    error, directory = torch.OutOfMemoryError(CUDA), tmp_path / "profile"
    held = keep_snapshot(error, directory, rank=3, log=log.append, allocator=FakeAllocator(split))
    assert (directory / "oom_rank3.pickle").read_bytes() == b"snapshot"
    assert log == ["the table"]
    lines = str(explain(error, tiny_config(), rank=3, dp=1, step=7, held=held)).splitlines()
    assert lines[0] == "rank 3 ran out of GPU memory in step 7, asking for 20.50 GiB"
    assert lines[1].startswith(
        f"the allocator holds 76.0 GiB: 60.0 GiB in use (at most 70.0 GiB), {said} GiB in pieces between; "
        "the device has 3.00 GiB of 79.0 GiB free"
    )
    assert ("expandable_segments" in lines[1]) == in_pieces
    assert str(directory / "oom_rank3.pickle") in lines[2]
    assert "recompute with" in lines[3]
    assert len(lines) == 4


def test_a_snapshot_that_cannot_be_kept_costs_only_itself(tmp_path: Path) -> None:
    log: list[str] = []
    allocator = FakeAllocator(2, OSError(28, "No space left on device"))
    error = torch.OutOfMemoryError(CUDA)
    held = keep_snapshot(error, tmp_path, rank=0, log=log.append, allocator=allocator)
    assert held.count("\n") == 1
    assert "the allocator holds" in held
    assert "No space left" in log[-1]
    of_the_host = MemoryError("can't allocate memory")
    assert keep_snapshot(of_the_host, tmp_path / "none", rank=0, log=log.append, allocator=allocator) == ""
    assert not (tmp_path / "none").exists()
