"""Reads DCP's index (``.metadata``) without running what is in it.

The index is a pickle, and unpickling a foreign file runs code of its author's choice. We keep the format, so
that torch's own tools read our checkpoints, and read it with an unpickler that resolves every name to an
inert record made for this one call: nothing is imported, nothing is called, and there is nothing lasting to
tamper with. The records are then checked and turned into DCP's classes.
"""

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fp8train.checkpoint.errors import CorruptCheckpointError

_RECORDS = frozenset(
    {
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("builtins", "getattr"),  # how Python 3.11.0 to 3.11.3 pickle a member of an enum; inert too
        ("torch", "Size"),
    }
)


class _Record:
    """Stands for an object of an allowed class: its constructor's arguments and its state, nothing else."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._classes = {f"{module}.{name}": type(name, (_Record,), {}) for module, name in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        """An inert class for the names that an index holds, a dtype for a dtype's; nothing else."""
        if (module, name) in _RECORDS:
            return self._classes[f"{module}.{name}"]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_metadata(path: Path, shard_files: Collection[str]) -> Metadata:
    """Read and check the DCP index at ``path``.

    ``shard_files`` are the names of the checkpoint's own files; an index that points anywhere else is
    refused. Raises :class:`CorruptCheckpointError` and runs nothing when the file holds anything but an
    index.
    """
    data = path.read_bytes()
    try:
        root = _InertUnpickler(io.BytesIO(data)).load()
        return _metadata(root, frozenset(shard_files))
    except Exception as error:  # hostile or broken bytes can raise anything; all of it means the same
        raise CorruptCheckpointError(f"{path}: refused: not a checkpoint index ({error})") from None


def _take(record: object, kind: str) -> Any:
    """The state of a record, after checking what it stands for."""
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise ValueError(f"{kind} expected, found {type(record).__name__}")
    return record.state


def _size(record: object) -> torch.Size:
    _take(record, "Size")
    (values,) = record.args or ((),)  # type: ignore[attr-defined]
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("negative or non-integer size")
    return torch.Size(values)


def _metadata(root: object, shard_files: frozenset[str]) -> Metadata:
    fields = _take(root, "Metadata")
    tensors = {_name(key): _tensor(value) for key, value in fields["state_dict_metadata"].items()}
    storage: dict[MetadataIndex, Any] = {}
    for key, value in fields["storage_data"].items():
        index = _take(key, "MetadataIndex")
        storage[MetadataIndex(_name(index["fqn"]), _size(index["offset"]))] = _storage(value, shard_files)
    chunks = {MetadataIndex(key, chunk.offsets) for key, tensor in tensors.items() for chunk in tensor.chunks}
    if chunks != set(storage):
        raise ValueError("tensors and storage entries differ")
    return Metadata(state_dict_metadata=dict(tensors), storage_data=storage, version=_name(fields["version"]))


def _name(value: object) -> str:
    if type(value) is not str:
        raise ValueError("name expected")
    return value


def _tensor(record: object) -> TensorStorageMetadata:
    fields = _take(record, "TensorStorageMetadata")
    dtype = _take(fields["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("dtype expected")
    chunks = []
    for one in fields["chunks"]:
        chunk = _take(one, "ChunkStorageMetadata")
        chunks.append(ChunkStorageMetadata(offsets=_size(chunk["offsets"]), sizes=_size(chunk["sizes"])))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(fields["size"]), chunks)


def _storage(record: object, shard_files: frozenset[str]) -> Any:
    fields = _take(record, "_StorageInfo")
    name, offset, length = fields["relative_path"], fields["offset"], fields["length"]
    if (
        name not in shard_files
        or type(offset) is not int
        or type(length) is not int
        or min(offset, length) < 0
    ):
        raise ValueError(f"it points at {name!r}")
    if fields.get("transform_descriptors"):
        raise ValueError("it asks for a transform")
    return filesystem._StorageInfo(name, offset, length)
