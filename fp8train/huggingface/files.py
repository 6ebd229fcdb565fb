"""The safetensors files of a model, read tensor by tensor.

safetensors hold a JSON header and plain bytes, so reading one executes nothing. Pickled weights
(``pytorch_model.bin``) are refused. Files are memory-mapped; a tensor's bytes are read when it is asked for.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8train.huggingface.errors import HuggingFaceError
from fp8train.json_text import read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATING = ("F64", "F32", "F16", "BF16")
"""Types of unquantised numbers, in safetensors' notation."""


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

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.__exit__(*error)

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
        """Names of all tensors in the files."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor in safetensors' notation, such as ``BF16``; from the file's header."""
        return str(self._where[name].get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """Read a tensor to the CPU, as it is stored."""
        return self._where[name].get_tensor(name)


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(read_object(index)["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise HuggingFaceError(f"{index}: not an index of safetensors files: {error}") from None
        wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if wrong:
            raise HuggingFaceError(f"{index}: {wrong[0]!r} is not the name of a file beside it")
        return names
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    pickled = [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt*"))]
    if pickled:
        raise HuggingFaceError(
            f"{folder}: holds {pickled[0].name} and no {SINGLE_FILE}; a pickle can run code when it is read "
            "and is not imported\nload the model with transformers where you trust it, and write it again: "
            "model.save_pretrained(DIR)"
        )
    raise HuggingFaceError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
