"""``fp8train export states``: a checkpoint's master weights and moments as FP32 numbers in safetensors.

A checkpoint stores states as they are trained: FP8 payloads with scales, FP16, BF16 with a remainder. Who
analyses or converts them wants numbers under the parameters' own names: the master weight of a parameter is
stored as its FQN, its moments as ``exp_avg/FQN`` and ``exp_avg_sq/FQN``. Decoding is exact, but for runs in
FP64, whose states are rounded. Memory is one output file's worth, stored and decoded.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fp8train.checkpoint import load_checkpoint
from fp8train.checkpoint.errors import explain_os_error
from fp8train.checkpoint.files import TMP_SUFFIX, fsync_dir, replace_file
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import TrainedRun, open_run
from fp8train.inference.weights import as_trained
from fp8train.models.param_spec import ParamSpec
from fp8train.optim.formats import make_storage
from fp8train.optim.from_config import state_plan
from fp8train.optim.parameter_state import Region, in_plan, logical_tensors, make_layout
from fp8train.optim.state_plan import StateFormat
from fp8train.optim.storage import Storage

_SUFFIX = ".safetensors"
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


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
        layout = make_layout(self.spec, self.region, self.fmt, torch.device("cpu"))
        return make_storage(self.fmt, layout, wide=self.wide)


def export_states(checkpoint: Path, output: Path, *, max_shard_bytes: int) -> str:
    """Write the decoded states of a checkpoint; returns a line that says what was written.

    Args:
        checkpoint: see :func:`fp8train.inference.load.resolve_checkpoint`; verified in full.
        output: ``NAME.safetensors``. What does not fit one file goes to ``NAME-00001-of-0000N.safetensors``
            and so on, with ``NAME.safetensors.index.json`` to say what is where, as Hugging Face does.
        max_shard_bytes: of a file, unless a single tensor is larger.

    Raises:
        InferenceError: the output exists or cannot be written, or safetensors is not installed.
        CheckpointError: the checkpoint is damaged.
    """
    if find_spec("safetensors") is None:
        raise InferenceError("export needs safetensors; install it with  pip install 'fp8train[hf]'")
    if output.suffix != _SUFFIX:
        raise InferenceError(f"--output {output}: name a file that ends with {_SUFFIX}")
    run = open_run(checkpoint)
    shards = list(_split(_states(run), max_shard_bytes))
    stem = output.name.removesuffix(_SUFFIX)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}{_SUFFIX}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [output.name]
    total = sum(state.num_bytes for shard in shards for state in shard)
    index = output.with_name(f"{output.name}.index.json")
    _check_output(output, [*names, index.name], total)
    metadata = {"format": "pt", "step": str(run.step), "states": str(state_plan(run.config))}
    for name, shard in zip(names, shards, strict=True):
        _write(output.with_name(name), _decode(run, shard), metadata)
    if len(shards) > 1:
        places = {state.name: name for name, shard in zip(names, shards, strict=True) for state in shard}
        content = {"metadata": {"total_size": total, **metadata}, "weight_map": places}
        replace_file(index, (json.dumps(content, indent=2) + "\n").encode())
    where = str(output) if len(shards) == 1 else f"{len(shards)} files beside {index}"
    count = sum(map(len, shards))
    return f"{where}: {count} tensors, {total:,} bytes in FP32, of {run.path} (step {run.step})"


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        InferenceError: it is none of these, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise InferenceError(f"--max-shard-size {text}: write bytes, or for instance 500MB or 5GB")
    return size


def _states(run: TrainedRun) -> list[_State]:
    model, formats = as_trained(run.config, run.vocab_size), state_plan(run.config).formats()
    return [
        _State(
            role,
            model.specs[fqn],
            fmt if in_plan(model.specs[fqn]) else StateFormat(),
            torch.float64 if parameter.dtype == torch.float64 else torch.float32,
        )
        for fqn, parameter in model.named_parameters()
        for role, fmt in formats.items()
    ]


def _split(states: list[_State], max_bytes: int) -> Iterator[list[_State]]:
    shard: list[_State] = []
    used = 0
    for state in states:
        if shard and used + state.num_bytes > max_bytes:
            yield shard
            shard, used = [], 0
        shard.append(state)
        used += state.num_bytes
    yield shard


def _decode(run: TrainedRun, states: list[_State]) -> dict[str, Tensor]:
    storages = {state.name: state.storage() for state in states}
    stored = {
        name: tensor
        for state in states
        for name, tensor, _, _ in logical_tensors(state.role, state.spec, state.region, storages[state.name])
    }
    load_checkpoint(run.path, stored, group=None, verify="size", allow_unexpected=True)
    return {
        name: storage.load(0, storage.layout.numel).view(storage.layout.shape).float().clone()
        for name, storage in storages.items()
    }


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


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tmp = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        save_file(tensors, tmp, metadata=metadata)
        tmp.chmod(0o644)  # safetensors leaves it to its owner alone
        with tmp.open("rb") as stream:
            os.fsync(stream.fileno())
        tmp.rename(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise InferenceError(f"{path} cannot be written: {explain_os_error(error)}") from error
    except SafetensorError as error:
        raise InferenceError(f"{path} cannot be written: {error}") from error
    finally:
        tmp.unlink(missing_ok=True)
