"""Writes a resolved config as YAML that loads again to the same config."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from fp8train.config.ownership import look_at, why_unread
from fp8train.config.recipe_registry import STATIC_RECIPES
from fp8train.config.scalars import needs_quotes
from fp8train.config.schema import Config, to_plain


class _Representer(SafeRepresenter):
    """Strings that a YAML 1.1 reader would turn into a bool or a number are written in quotes."""


def _represent_text(representer: SafeRepresenter, text: str) -> ScalarNode:
    style = '"' if needs_quotes(text) else None
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(representer: SafeRepresenter, values: list[Any]) -> Any:
    return representer.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Representer.add_representer(str, _represent_text)
_Representer.add_representer(list, _represent_list)


def effective(config: Config) -> dict[str, Any]:
    """``config`` as nested plain values, without what has no effect.

    How FP8 GEMMs (or the one of weight gradients) and FP8 gradients would be done is left out where they are
    off, and the bound on AdamW's steps where none is bounded: it has no effect, and a file that sets it is
    refused as contradictory. Loading fills the same presets again.
    """
    plain = to_plain(config)
    precision = plain["precision"]
    if not config.precision.gemm.fp8:
        if config.precision.recipe not in STATIC_RECIPES:
            del precision["recipe"]
        del precision["profile"], precision["state"], precision["weights"]
        precision["gemm"] = {"fp8": False}
    elif not config.precision.gemm.grad_weight.fp8:
        precision["gemm"]["grad_weight"] = {"fp8": False}
    if config.precision.gemm.fp8 and not bounds_updates(config):
        del precision["state"]["bounded_update"]
    if config.precision.gradient.format == "high_precision":
        del precision["gradient"]["fp8"]
    return plain


def bounds_updates(config: Config) -> bool:
    """Whether ``precision.state.bounded_update`` has any effect."""
    return why_unread(("precision", "state", "bounded_update"), look_at(config)) is None


def dump_yaml(config: Config) -> str:
    """``config`` as YAML text, every effective value written out; :func:`load_config` reads it back equal."""
    return dump_plain(effective(config))


def dump_plain(data: dict[str, Any]) -> str:
    """Nested plain values as YAML text: blocks for mappings, brackets for lists."""
    writer = YAML(typ="safe", pure=True)
    writer.Representer = _Representer
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 4096
    writer.allow_unicode = True
    stream = io.StringIO()
    writer.dump(data, stream)
    return stream.getvalue()
