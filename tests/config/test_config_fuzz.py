"""Whatever is written, the answer is a config or a ConfigError of at most five lines; nothing else
escapes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fp8train.config.dump import dump_yaml
from fp8train.config.errors import ConfigError
from fp8train.config.keys import KeyTable
from fp8train.config.loader import load_file
from fp8train.config.resolve import ResolvedConfig, load_config, resolve_mapping
from fp8train.config.yaml_tree import parse_text
from tests.config.examples import MINIMAL, minimal

TABLE = KeyTable()
NAMES = sorted({key.path[-1] for key in TABLE.keys.values()})
LEAVES = [key.path for key in TABLE.leaves()]
WORDS = sorted(
    {str(c) for k in TABLE.leaves() for c in k.fragment.get("enum", [k.fragment.get("const", "auto")])}
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-4, max_value=600),
    st.integers(min_value=-(10**320), max_value=10**320),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([*WORDS, "no", "on", "1_000", "3e-4", "010", "", "\0", "\ud800", "a: b", "🦙"]),
)
keys = st.one_of(st.sampled_from(NAMES), st.text(max_size=6), st.sampled_from(["base", "optimizer.lr", "<<"]))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
odd_values = st.one_of(
    values, st.binary(max_size=3), st.just(object()), st.dictionaries(st.integers(), scalars, max_size=2)
)

fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)
on_disk = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(make: Any) -> ResolvedConfig | None:
    """The result of ``make``, or None after a proper ConfigError."""
    try:
        return make()
    except ConfigError as error:
        message = str(error)
        assert message.strip()
        assert len(message.splitlines()) <= 5, message
        assert len(message) < 4000
        message.encode()  # can be printed
        return None


@fuzz
@given(st.dictionaries(keys, values, max_size=6))
def test_any_mapping(data: dict[str, Any]) -> None:
    check(lambda: resolve_mapping(data))


@fuzz
@given(odd_values)
def test_any_python_value(data: Any) -> None:
    check(lambda: resolve_mapping(data))
    check(lambda: resolve_mapping({**minimal(), "run": data}))


@fuzz
@given(st.lists(st.tuples(st.sampled_from(LEAVES), values), min_size=1, max_size=4), st.booleans())
@example([(("model", "num_heads"), 10**320)], False)
@example([(("optimizer", "lr"), 10**320)], False)
@example([(("model", "hidden_size"), True), (("model", "family"), "gpt")], False)
def test_a_valid_config_with_some_values_changed(
    changes: list[tuple[tuple[str, ...], Any]], fp8: bool
) -> None:
    data: dict[str, Any] = {**minimal(), **({"precision": {"gemm": {"fp8": True}}} if fp8 else {})}
    for path, value in changes:
        target = data
        for name in path[:-1]:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[path[-1]] = copy.deepcopy(value)
    resolved = check(lambda: resolve_mapping(data))
    if resolved is not None:
        again = resolve_mapping(parse_text(dump_yaml(resolved.config), "dump").plain())
        assert again.config == resolved.config


@fuzz
@given(st.data())
def test_a_valid_config_with_parts_removed(data: st.DataObject) -> None:
    config = minimal()
    for _ in range(data.draw(st.integers(1, 4))):
        section = data.draw(st.sampled_from(sorted(config)))
        if not config[section] or data.draw(st.booleans()):
            del config[section]
        else:
            del config[section][data.draw(st.sampled_from(sorted(config[section])))]
        if not config:
            break
    check(lambda: resolve_mapping(config))


yaml_like = st.lists(
    st.sampled_from(
        ["model", "train", "lr", "base", ":", ": ", "\n", "\n  ", "- ", "{", "}", "[", "]", ",", "&a ",
         "*a", "!!", "!x ",
         "'", '"', "|\n", ">-", "#", " #", "\t", "%YAML", "---\n", "...", "? ", "<<", "1e5", "010",
         "\\", "\\U", "FFFFFFFF",
         "\ufeff", "\u2028", "\x85", "\r", "é", "@", "`", "~", "null", "run.yaml"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@fuzz
@given(st.text(max_size=60) | yaml_like)
@example('a: "\\UFFFFFFFF"')
@example("? ? ? ? a")
@example("- - - - -")
@example("&a &b c: 1")
@example("!<tag:yaml.org,2002:python/object/apply:os.system> [x]")
def test_any_text(text: str) -> None:
    check(lambda: parse_text(text, "fuzz.yaml"))


@on_disk
@given(
    content=st.binary(max_size=80) | yaml_like.map(str.encode) | st.just(MINIMAL.encode()),
    cut=st.integers(0, 200),
)
def test_any_file(content: bytes, cut: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(MINIMAL.encode()[:cut] + content)
    check(lambda: load_file(path))
    check(lambda: load_config(path))


@on_disk
@given(
    text=st.one_of(
        st.text(max_size=30),
        st.tuples(st.sampled_from([".".join(path) for path in LEAVES]), st.text(max_size=12)).map("=".join),
        st.tuples(st.sampled_from(sorted(TABLE.keys)), values.map(lambda v: json.dumps(v))).map("=".join),
    )
)
def test_any_override(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if not path.exists():
        path.write_text(MINIMAL)
    check(lambda: load_config(path, [text]))


def test_the_checker_is_not_vacuous() -> None:
    assert check(lambda: resolve_mapping(minimal())) is not None
    with pytest.raises(KeyError):
        check(lambda: {}["missing"])
