"""Rotary positions in a config.json: transformers before version 5 wrote ``rope_theta`` and ``rope_scaling``,
since then ``rope_parameters`` holds both. Both are read; the older form is written, which all versions and
other programs read.

Pairs of dimensions are (i, i + D/2) on both sides (:mod:`fp8train.layers.rotary`), so no weight is permuted.
"""

from __future__ import annotations

from typing import Any

from fp8train.config.model_schema import ModelConfig
from fp8train.huggingface.config_json import ConfigJson

_SCALING: dict[str, tuple[str, type[int] | type[float]]] = {
    "factor": ("factor", float),
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_max_seq_len": ("original_max_position_embeddings", int),
}
"""Keys of ``model.rope_scaling``: theirs, and what they hold."""


def rope_settings(config: ConfigJson, *, theta_key: str, share_key: str, share: float) -> dict[str, Any]:
    """``positions``, ``rope_theta`` and ``rope_scaling`` of our ``model`` section.

    Args:
        config: the file.
        theta_key: the older form's key of the base.
        share_key: the older form's key of the share of a head that is rotated.
        share: that share where the file says nothing.
    """
    old, new = config.optional("rope_scaling"), config.optional("rope_parameters")
    where = "rope_parameters" if new else "rope_scaling"
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            config.refuse(key, value, "it is an object, or null")
    rope: dict[str, Any] = dict(new or old or {})
    old_theta, old_share = config.optional(theta_key), config.optional(share_key, share)
    theta = ConfigJson(config.path, {theta_key: rope.pop("rope_theta", old_theta)})
    settings: dict[str, Any] = {
        "positions": "rope",
        "rope_theta": theta.number(theta_key, float, default=10000.0),
    }
    rotated = rope.pop("partial_rotary_factor", old_share)
    if rotated != 1:
        config.refuse(share_key, rotated, "this decoder rotates whole heads")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return settings
    if kind != "llama3":
        config.refuse(f"{where}.rope_type", kind, "this decoder has default and llama3")
    scaling = ConfigJson(config.path, rope)
    return {
        **settings,
        "rope_scaling": {ours: scaling.number(key, kind) for ours, (key, kind) in _SCALING.items()},
    }


def rope_config(model: ModelConfig, *, theta_key: str) -> dict[str, Any]:
    """The keys of a config.json that describe our rotary positions, in the form that all versions read."""
    keys: dict[str, Any] = {theta_key: model.rope_theta, "rope_scaling": None}
    if model.rope_scaling is not None:
        scaling = model.rope_scaling.model_dump()
        keys["rope_scaling"] = {"rope_type": "llama3"} | {
            key: scaling[ours] for ours, (key, _) in _SCALING.items()
        }
    return keys
