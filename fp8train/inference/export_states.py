"""``fp8train export states``: a checkpoint's master weights and moments as FP32 numbers in safetensors.

A checkpoint stores states as they are trained: FP8 payloads with scales, FP16, BF16 with a remainder. Who
analyses or converts them wants numbers under the parameters' own names: the master weight of a parameter is
stored as its FQN, its moments as ``exp_avg/FQN`` and ``exp_avg_sq/FQN``. Decoding is exact, but for runs in
FP64, whose states are rounded. Memory is one output file's worth, stored and decoded.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from fp8train.checkpoint.safetensors_files import (
    INDEX_SUFFIX,
    SUFFIX,
    Part,
    file_names,
    shards_of,
    write_safetensors,
)
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import open_run
from fp8train.inference.stored_states import StoredStates


def export_states(checkpoint: Path, output: Path, *, max_shard_bytes: int) -> str:
    """Write the decoded states of a checkpoint; returns a line that says what was written.

    Args:
        checkpoint: see :func:`fp8train.inference.load.resolve_checkpoint`; verified in full.
        output: ``NAME.safetensors``. What does not fit one file goes to ``NAME-00001-of-0000N.safetensors``
            and so on, with ``NAME.safetensors.index.json`` to say what is where, as Hugging Face does.
        max_shard_bytes: of a file, unless a single tensor is larger.

    Raises:
        InferenceError: the output exists or there is no place for it.
        CheckpointError: the checkpoint is damaged, or a file cannot be written.
    """
    if output.suffix != SUFFIX:
        raise InferenceError(f"--output {output}: name a file that ends with {SUFFIX}")
    run = open_run(checkpoint)
    states = run.states()
    parts = [_part(states, fqn, role) for fqn in states.model.specs for role in states.formats]
    stem = output.name.removesuffix(SUFFIX)
    names = file_names(stem, len(list(shards_of(parts, max_bytes=max_shard_bytes))))
    index = output.with_name(f"{stem}{INDEX_SUFFIX}")
    total = sum(sum(sizes.values()) for sizes, _ in parts)
    _check_output(output, [*names, index.name], total)
    metadata = {"step": str(run.step), "states": str(run.config.state_formats)}
    write_safetensors(output.parent, stem, parts, max_bytes=max_shard_bytes, metadata=metadata)
    where = str(output) if len(names) == 1 else f"{len(names)} files beside {index}"
    return f"{where}: {len(parts)} tensors, {total:,} bytes in FP32, of {run.path} (step {run.step})"


def _part(states: StoredStates, fqn: str, role: str) -> Part:
    name = fqn if role == "master" else f"{role}/{fqn}"
    size = 4 * math.prod(states.model.specs[fqn].global_shape)
    return {name: size}, lambda: {name: states.read(fqn, role).float()}


def _check_output(output: Path, names: list[str], needed: int) -> None:
    """Before anything is read: nothing is overwritten, and it fits."""
    existing = [name for name in names if output.with_name(name).exists()]
    if existing:
        raise InferenceError(f"{output.with_name(existing[0])} exists; choose another --output or delete it")
    if not output.parent.is_dir():
        raise InferenceError(f"--output {output}: there is no folder {output.parent}")
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise InferenceError(f"--output {output}: {needed:,} bytes are needed, {free:,} are free")
