"""``fp8train export states``: a checkpoint's master weights and moments as FP32 numbers in safetensors.

A checkpoint stores states as they are trained: FP8 payloads with scales, FP16, BF16 with a remainder. Who
analyses or converts them wants numbers under the parameters' own names: the master weight of a parameter is
stored as its FQN, its moments as ``exp_avg/FQN`` and ``exp_avg_sq/FQN``. Decoding is exact, but for runs in
FP64, whose states are rounded. Memory is one output file's worth, stored and decoded.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fp8train.checkpoint.load import OpenCheckpoint, open_checkpoint
from fp8train.checkpoint.safetensors_files import (
    INDEX_SUFFIX,
    SUFFIX,
    Part,
    file_names,
    shards_of,
    write_safetensors,
)
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import TrainedRun, open_run
from fp8train.models.build import outline
from fp8train.models.param_spec import ParamSpec
from fp8train.optim.checkpoint_states import with_stored_blocks
from fp8train.optim.make_storage import make_storage
from fp8train.optim.parameter_state import Region, in_plan, logical_tensors, place_of
from fp8train.optim.state_storage import Storage
from fp8train.precision.state_formats import StateFormat


@dataclass(frozen=True)
class _State:
    """One state of one parameter."""

    role: str
    spec: ParamSpec
    fmt: StateFormat
    wide: torch.dtype

    @property
    def name(self) -> str:
        """In the output."""
        return self.spec.fqn if self.role == "master" else f"{self.role}/{self.spec.fqn}"

    @property
    def num_bytes(self) -> int:
        """Decoded."""
        return 4 * math.prod(self.spec.global_shape)

    @property
    def region(self) -> Region:
        """All of it."""
        return Region(self.spec.global_shape, (0,) * len(self.spec.global_shape))

    def storage(self) -> Storage:
        """Of the whole logical tensor, zeros."""
        place = place_of(self.spec, self.region, self.fmt, torch.device("cpu"))
        return make_storage(self.fmt, place, wide=self.wide)


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
    opened = open_checkpoint(run.path, group=None, verify="size")
    states = _states(run, opened)
    parts: list[Part] = [({state.name: state.num_bytes}, partial(_decode, opened, state)) for state in states]
    stem = output.name.removesuffix(SUFFIX)
    names = file_names(stem, len(list(shards_of(parts, max_bytes=max_shard_bytes))))
    index = output.with_name(f"{stem}{INDEX_SUFFIX}")
    total = sum(state.num_bytes for state in states)
    _check_output(output, [*names, index.name], total)
    metadata = {"step": str(run.step), "states": str(run.config.state_formats)}
    write_safetensors(output.parent, stem, parts, max_bytes=max_shard_bytes, metadata=metadata)
    where = str(output) if len(names) == 1 else f"{len(names)} files beside {index}"
    return f"{where}: {len(states)} tensors, {total:,} bytes in FP32, of {run.path} (step {run.step})"


def _states(run: TrainedRun, opened: OpenCheckpoint) -> list[_State]:
    model, formats = outline(run.config, run.vocab_size), run.config.state_formats.formats()
    stored = opened.tensors
    return [
        _State(
            role,
            model.specs[fqn],
            with_stored_blocks(fmt, stored, role, fqn) if in_plan(model.specs[fqn]) else StateFormat(),
            torch.float64 if parameter.dtype == torch.float64 else torch.float32,
        )
        for fqn, parameter in model.named_parameters()
        for role, fmt in formats.items()
    ]


def _decode(opened: OpenCheckpoint, state: _State) -> dict[str, Tensor]:
    storage = state.storage()
    opened.read(
        {
            name: tensor
            for name, tensor, _, _ in logical_tensors(state.role, state.spec, state.region, storage)
        }
    )
    values = storage.load(0, storage.place.numel).view(storage.place.shape)
    return {state.name: values.float().clone()}


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
