"""Configurations as checkpoints hold them, of this version and of older ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fp8train.config.schema import Config

_MOVED = {("run", "attention_backend"): ("kernels", "attention")}
"""Keys that have another place now."""


def as_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, as nested plain values, with every key in its place of today."""
    plain = copy.deepcopy(dict(saved))
    for (section, name), (other, now) in _MOVED.items():
        if name in plain.get(section, {}):
            plain.setdefault(other, {})[now] = plain[section].pop(name)
    return plain


def stored_config(saved: Mapping[str, Any]) -> Config:
    """The configuration that a checkpoint was written with.

    Raises:
        pydantic.ValidationError: it is none.
    """
    return Config.model_validate(as_now(saved))
