"""What YAML text means, against a table written from the YAML 1.2 core schema, and where it says so."""

from __future__ import annotations

import math

import pytest

from fp8train.config.errors import ConfigError
from fp8train.config.scalars import needs_quotes, parse_plain
from fp8train.config.yaml_tree import parse_text

CORE_SCHEMA = {
    "null": None, "~": None, "Null": None, "": None,
    "true": True, "False": False, "TRUE": True,
    "0": 0, "-7": -7, "+12": 12, "1234567890123": 1234567890123, "0o17": 15, "0x1F": 31,
    "3e-4": 3e-4, "3.0e-4": 3e-4, "1E5": 1e5, "-0.5": -0.5, ".5": 0.5, "5.": 5.0,
    "1.": 1.0, "1e5": 1e5, "12e03": 12e3,
    "no": "no", "yes": "yes", "on": "on", "off": "off", "Y": "Y", "1_000": "1_000", "1:30": "1:30",
    "tRue": "tRue", "1e": "1e", "0b101": "0b101", "1.2.3": "1.2.3", "-": "-",
    "bf16": "bf16", "2024-01-01": "2024-01-01",
}  # fmt: skip


@pytest.mark.parametrize("text", CORE_SCHEMA)
def test_plain_scalar(text: str) -> None:
    value = parse_plain(text)
    assert value == CORE_SCHEMA[text]
    assert type(value) is type(CORE_SCHEMA[text])


def test_special_floats() -> None:
    assert parse_plain(".inf") == math.inf
    assert parse_plain("-.INF") == -math.inf
    assert math.isnan(float(str(parse_plain(".nan"))))


def test_quoted_and_block_scalars_are_text() -> None:
    root = parse_text("a: \"10\"\nb: 'true'\nc: >-\n  7\n", "x")
    assert root.plain() == {"a": "10", "b": "true", "c": "7"}


def test_positions_are_those_of_keys() -> None:
    root = parse_text("a:\n  b: 1\n  c: [x,\n    y]\n", "f.yaml")
    at = {path: root.nearest_origin(path) for path in (("a",), ("a", "b"), ("a", "c"), ("a", "c", 1))}
    assert {path: (origin.line, origin.column) for path, origin in at.items()} == {
        ("a",): (1, 1),
        ("a", "b"): (2, 3),
        ("a", "c"): (3, 3),
        ("a", "c", 1): (4, 5),
    }
    assert str(at["a", "b"]) == "f.yaml:2"


def test_aliases_repeat_the_value() -> None:
    root = parse_text("a: &x {k: [1, 2]}\nb: *x\nc: [*x, *x]\n", "f.yaml")
    once = {"k": [1, 2]}
    assert root.plain() == {"a": once, "b": once, "c": [once, once]}
    assert root.size == 1 + 4 * 4 + 1


def test_words_that_other_readers_misread_are_quoted() -> None:
    for text in (
        "no",
        "Off",
        "y",
        "010",
        "1_0",
        "1:30",
        "3e-4",
        ".5",
        "null",
        "",
        " a",
        "0x1f",
        "1e5",
        "=",
        "<<",
    ):
        assert needs_quotes(text), text
    for text in ("bf16", "data/x", "O0", "run_1", "v1.2-rc", "llama"):
        assert not needs_quotes(text), text


def test_a_broken_escape_is_not_a_python_error() -> None:
    with pytest.raises(ConfigError, match="unprintable character U\\+D800"):
        parse_text('a: "\\ud800"', "f.yaml")
