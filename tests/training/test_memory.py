"""Failed allocations, in the words that torch really uses, become advice."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest
import torch

from fp8train.training.memory import explain, is_out_of_memory
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
