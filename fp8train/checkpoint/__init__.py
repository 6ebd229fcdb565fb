"""Checkpoints that are whole or absent: saving, verifying, finding and loading, in any sharding.

``save_checkpoint`` and ``load_checkpoint`` move named tensors between ranks and a directory,
``BackgroundSaver`` saves while training goes on,
``find_checkpoint`` says which directory to continue from, ``capture_rng`` and ``restore_rng`` turn random
generators into tensors.

A name's module is imported when the name is first asked for: the check before a run looks at checkpoints
through :mod:`fp8train.checkpoint.catalog` and must not pay for torch, which saving and loading need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8train.checkpoint.background import BackgroundSaver, Written
    from fp8train.checkpoint.catalog import candidates, find_checkpoint, sweep_leftovers
    from fp8train.checkpoint.errors import CheckpointError, CorruptCheckpointError
    from fp8train.checkpoint.load import (
        LoadedCheckpoint,
        OpenCheckpoint,
        load_checkpoint,
        open_checkpoint,
        read_meta,
    )
    from fp8train.checkpoint.logical import LogicalTensor
    from fp8train.checkpoint.manifest import verify_checkpoint
    from fp8train.checkpoint.ranks import Ranks
    from fp8train.checkpoint.retention import EVAL_LOSS, Retention
    from fp8train.checkpoint.rng import capture_rng, restore_rng
    from fp8train.checkpoint.save import Order, save_checkpoint, with_rank_state, write_checkpoint

_MODULES = {
    "BackgroundSaver": "background",
    "CheckpointError": "errors",
    "CorruptCheckpointError": "errors",
    "EVAL_LOSS": "retention",
    "LoadedCheckpoint": "load",
    "LogicalTensor": "logical",
    "OpenCheckpoint": "load",
    "Order": "save",
    "Ranks": "ranks",
    "Retention": "retention",
    "Written": "background",
    "candidates": "catalog",
    "capture_rng": "rng",
    "find_checkpoint": "catalog",
    "load_checkpoint": "load",
    "open_checkpoint": "load",
    "read_meta": "load",
    "restore_rng": "rng",
    "save_checkpoint": "save",
    "sweep_leftovers": "catalog",
    "verify_checkpoint": "manifest",
    "with_rank_state": "save",
    "write_checkpoint": "save",
}

__all__ = [
    "EVAL_LOSS",
    "BackgroundSaver",
    "CheckpointError",
    "CorruptCheckpointError",
    "LoadedCheckpoint",
    "LogicalTensor",
    "OpenCheckpoint",
    "Order",
    "Ranks",
    "Retention",
    "Written",
    "candidates",
    "capture_rng",
    "find_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "read_meta",
    "restore_rng",
    "save_checkpoint",
    "sweep_leftovers",
    "verify_checkpoint",
    "with_rank_state",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
