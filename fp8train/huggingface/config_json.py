"""Reading a ``config.json`` strictly: what is read, what must have one value, and what nobody asked for.

A key that transformers' class gives a meaning is either mapped to a setting of ours or must have the one
value that our decoder computes; anything else is refused with key and value. Keys that have no meaning to the
class (files carry many) are listed in the report of an import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8train.config.scalars import shorten
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.json_text import read_object

CONFIG_FILE = "config.json"

_NEUTRAL = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "task_specific_params",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Keys that change no logit."""


class ConfigJson:
    """The values of a config.json, and which of them were looked at.

    Args:
        path: the file, for messages.
        values: its content.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        self._seen: set[str] = set()

    def number(self, key: str, kind: type[int] | type[float] = int, *, default: Any = None) -> Any:
        """A positive number; ``default`` where the key is absent or null, without one it is required."""
        value = self.optional(key, default)
        if value is None:
            raise HuggingFaceError(f"{self.path}: {key} is missing")
        legal = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, legal) or not 0 < value < 2**63:
            raise HuggingFaceError(f"{self.path}: {key}: {_shown(value)} is not a positive number")
        return kind(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """Read a key that is true or false; ``default`` where it is absent or null."""
        value = self.optional(key, default)
        if not isinstance(value, bool):
            raise HuggingFaceError(f"{self.path}: {key}: {_shown(value)} is neither true nor false")
        return value

    def optional(self, key: str, default: Any = None) -> Any:
        """Read a key's value as it is; ``default`` where it is absent or null."""
        self._seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def choice(self, key: str, legal: dict[str, Any], *, default: str) -> Any:
        """Read a key with few legal values, and return what ``legal`` maps its value to."""
        value = self.optional(key, default)
        if not isinstance(value, str) or value not in legal:
            self.refuse(key, value, f"this decoder has {', '.join(legal)}")
        return legal[value]

    def only(self, key: str, legal: Any, *, default: Any, why: str) -> None:
        """The key must be ``legal`` (or absent, if ``default`` is)."""
        value = self.optional(key, default)
        if value != legal:
            self.refuse(key, value, why)

    def refuse(self, key: str, value: Any, why: str) -> None:
        """Raise: this decoder cannot compute what ``key`` asks for."""
        raise HuggingFaceError(f"{self.path}: {key}: {_shown(value)} cannot be imported: {why}")

    def unread(self) -> list[str]:
        """List ``key=value`` of everything that was not read and may mean something, sorted."""
        rest = sorted(set(self.values) - self._seen - _NEUTRAL)
        return [f"{shorten(key)}={_shown(self.values[key])}" for key in rest]


def _shown(value: Any) -> str:
    """A value as it is in the file, for a message."""
    try:
        return shorten(json.dumps(value), 200)
    except RecursionError:
        return "something nested deeply"


def read_config(folder: Path) -> ConfigJson:
    """Read the config.json of a model's folder.

    Raises:
        HuggingFaceError: it is not there, not JSON, or describes weights that are quantised or computed by
            code of its own.
    """
    path = folder / CONFIG_FILE
    try:
        values = read_object(path)
    except OSError as error:
        raise HuggingFaceError(
            f"{path}: {error.strerror or error}; give the folder of a model, with its config.json"
        ) from None
    except ValueError as error:
        raise HuggingFaceError(f"{path}: {error}") from None
    config = ConfigJson(path, values)
    why = "the model is computed by Python code in its folder, not by a class of transformers"
    config.only("auto_map", None, default=None, why=why)
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        config.refuse(
            "quantization_config.quant_method",
            method,
            "training starts from unquantised weights; get those, or load the model with transformers, "
            "dequantise it and save it again",
        )
    return config
