"""JSON Schema of the YAML that a person writes, for completion and checking in editors.

It differs from the schema of a validated config in what is required: keys that presets fill are not, and in a
file that builds on another (``base:``) nothing is, because the rest may come from there.
"""

from __future__ import annotations

import json
from typing import Any

from fp8train.config.keys import Key, KeyTable, key_table
from fp8train.config.schema import Config


def editor_schema() -> dict[str, Any]:
    """The schema as a dict (JSON Schema 2020-12)."""
    schema = Config.model_json_schema()
    table = key_table()
    for name, definition in schema["$defs"].items():
        if name != "BlendEntry":  # an entry of a list is always written whole
            definition.pop("required", None)
    schema.pop("required", None)
    file_names = {"type": "string", "minLength": 1}
    base = {
        "description": "Config file, or list of them, that this file builds on; relative to its folder.",
        "anyOf": [file_names, {"type": "array", "items": file_names, "minItems": 1}],
    }
    schema["properties"] = {"base": base, **schema["properties"]}
    schema["title"] = "fp8train config"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["if"] = {"not": {"required": ["base"]}}
    schema["then"] = _required(table.children(()), table)
    return schema


def _required(keys: list[Key], table: KeyTable) -> dict[str, Any]:
    """What must be present among ``keys`` and below them."""
    fragment: dict[str, Any] = {"required": [key.path[-1] for key in keys if key.required]}
    below = {
        key.path[-1]: _required(table.children(key.path), table)
        for key in keys
        if key.is_section and key.required
    }
    if below:
        fragment["properties"] = below
    return fragment


def dump_editor_schema() -> str:
    """The schema as JSON text."""
    return json.dumps(editor_schema(), indent=2) + "\n"
