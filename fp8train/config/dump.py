"""Writes a resolved config as YAML that loads again to the same config."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from fp8train.config.ownership import look_at, why_hidden
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
    """``config`` as nested plain values, without how FP8 would be done where it is off: loading fills the
    same presets again."""
    plain = to_plain(config)
    look = look_at(plain)

    def shown(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        below = {
            name: shown(value, (*path, name)) if isinstance(value, dict) else value
            for name, value in values.items()
            if why_hidden((*path, name), look) is None
        }
        return {name: value for name, value in below.items() if value != {}}

    return shown(plain, ())


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
