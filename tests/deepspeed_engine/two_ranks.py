"""Runs a function on two gloo ranks that have joined DeepSpeed, and hands back what each returns."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.free_ports import free_ports

INSTALL = "pip install --no-build-isolation deepspeed==0.19.8"
needs_deepspeed = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason=f"needs DeepSpeed: {INSTALL}"),
]


def _worker(rank: int, port: int, root: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about the collectives that DeepSpeed calls
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    try:
        result = function(rank, *args), None
    except Exception:
        result = None, traceback.format_exc()
    (root / str(rank)).write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


def on_two_ranks(root: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` of both ranks; both must be importable and return what pickle takes."""
    (port,) = free_ports(1)
    mp.spawn(_worker, args=(port, root, function, args), nprocs=2, join=True)
    results = []
    for rank in range(2):
        result, error = pickle.loads((root / str(rank)).read_bytes())
        assert error is None, f"rank {rank}:\n{error}"
        results.append(result)
    return results
