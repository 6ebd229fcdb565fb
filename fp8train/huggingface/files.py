"""The safetensors files of a model: read tensor by tensor, written shard by shard.

safetensors hold a JSON header and plain bytes, so reading one executes nothing. Pickled weights
(``pytorch_model.bin``) are refused. Files are memory-mapped; a tensor's bytes are read when it is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fp8train.huggingface.errors import HuggingFaceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATING = ("F64", "F32", "F16", "BF16")


class WeightFiles:
    """The tensors of a folder, by name. A context manager: it keeps files open.

    Args:
        folder: holds ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Raises:
        HuggingFaceError: there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: self._open(folder / name) for name in _file_names(folder)}
        self._where = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    @staticmethod
    def _open(path: Path) -> safe_open:
        try:
            return safe_open(path, framework="pt").__enter__()
        except OSError as error:
            raise HuggingFaceError(f"{path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise HuggingFaceError(f"{path}: not a safetensors file, or cut short: {error}") from None

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor, in safetensors' notation."""
        return str(self._where[name].get_slice(name).get_dtype())

    def is_floating(self, name: str) -> bool:
        """Whether a tensor holds unquantised numbers."""
        return self.dtype(name) in _FLOATING

    def read(self, name: str) -> Tensor:
        """A tensor, as stored."""
        return self._where[name].get_tensor(name)


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise HuggingFaceError(f"{index}: not an index of safetensors files: {error}") from None
        wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if wrong:
            raise HuggingFaceError(f"{index}: {wrong[0]!r} is not the name of a file beside it")
        return names
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        path.name for path in folder.glob("*.pt*")
    )
    if pickled:
        raise HuggingFaceError(
            f"{folder}: holds {pickled[0]} and no {SINGLE_FILE}; a pickle can run code when it is read and "
            "is not imported\nload the model with transformers where you trust it, and write it again: "
            "model.save_pretrained(DIR)"
        )
    raise HuggingFaceError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


Produce = Callable[[], dict[str, Tensor]]
"""Gives some of the tensors of a model, when it is their turn."""


def write_weights(folder: Path, parts: Sequence[tuple[dict[str, int], Produce]], *, max_bytes: int) -> int:
    """Write ``model.safetensors``, or shards and their index. At most one shard is in memory.

    Args:
        folder: exists.
        parts: for each group of tensors that is made at once, their sizes in bytes by name, and what makes
            them.
        max_bytes: largest shard; a part that is larger alone gets a shard of its own.

    Returns:
        Bytes of tensors written.
    """
    shards: list[list[tuple[dict[str, int], Produce]]] = [[]]
    filled = 0
    for part in parts:
        size = sum(part[0].values())
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    total = sum(sum(sizes.values()) for sizes, _ in parts)
    if len(shards) == 1:
        _write_shard(folder / SINGLE_FILE, (produce for _, produce in shards[0]))
        return total
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, (produce for _, produce in shard))
        weight_map |= {key: name for sizes, _ in shard for key in sizes}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_shard(path: Path, produce: Iterable[Produce]) -> None:
    tensors: dict[str, Tensor] = {}
    for one in produce:
        tensors |= one()
    save_file(tensors, path, metadata={"format": "pt"})


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a tensor."""
    return math.prod(shape) * dtype.itemsize


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MiB``, ...

    Raises:
        HuggingFaceError: it is not a size.
    """
    upper = text.strip().upper()
    for unit, factor in sorted(_UNITS.items(), key=lambda one: -len(one[0])):
        number = upper.removesuffix(unit)
        if number != upper and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * factor)
    raise HuggingFaceError(f"--max-shard-size {text}: not a size; write 5GB, 500MB, 2GiB, ...")
