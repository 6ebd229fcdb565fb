"""Every setting that nothing reads is refused, in every way in which the ownership table says so."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fp8train.config.conditions import (
    AllOf,
    AnyOf,
    Condition,
    Is,
    IsNot,
    Never,
    NotBelow,
    SeveralReplicas,
    Unless,
)
from fp8train.config.dump import dump_plain
from fp8train.config.errors import ConfigError
from fp8train.config.explain import explain
from fp8train.config.keys import Key, key_table
from fp8train.config.loader import load_file
from fp8train.config.ownership import (
    ALWAYS,
    RULES,
    Rule,
    always_read,
    is_neutral,
    look_in,
    rules_of,
    schema_defaults,
    why_unread,
)
from fp8train.config.presets import apply_presets
from fp8train.config.resolve import load_config, resolve_mapping
from tests.config.examples import MINIMAL, message_of, minimal, write

Settings = dict[str, Any]
LEAVES = key_table().leaves()


def test_every_key_is_in_the_table_or_always_read() -> None:
    """A new key is decided on, once."""
    both = [key.name for key in LEAVES if bool(rules_of(key.path)) == always_read(key.path)]
    assert both == []


def test_the_table_names_no_key_that_there_is_not() -> None:
    paths = [key.path for key in key_table().keys.values()]
    for rule in RULES:
        for pattern in (*rule.keys, *rule.but):
            assert any(Rule((pattern,), rule.condition).covers(path) for path in paths), pattern
    for pattern in ALWAYS:
        assert any(Rule((pattern,), Never("")).covers(path) for path in paths), pattern


def full(key: str, section: str) -> str:
    """A key of a condition, which may be one of the same section."""
    return f"{section}{key}" if key.startswith(".") else key


def legal_values(key: Key) -> list[Any]:
    """Some values that may be written for a key."""
    fragment = key.fragment
    if "enum" in fragment:
        return list(fragment["enum"])
    kind = next((one["type"] for one in (fragment, *fragment.get("anyOf", ())) if one.get("type")), None)
    if kind == "boolean":
        return [True, False]
    if kind in ("integer", "number"):
        inner = next((one for one in fragment.get("anyOf", ()) if one.get("type") == kind), fragment)
        low = inner.get("minimum", inner.get("exclusiveMinimum", 0))
        step = 1 if kind == "integer" else 0.25
        return [low + step, low + 2 * step]
    if kind == "array":
        return [[1, 1], ["layers.0.*"]] if fragment.get("items") or "anyOf" in fragment else []
    return ["text", "other"]


def off(condition: Condition, section: str) -> Iterator[Settings]:
    """Every way to make it not hold, in its own values."""
    match condition:
        case Is(key, values):
            name = full(key, section)
            yield from ({name: v} for v in legal_values(key_table().keys[name]) if v not in values)
        case IsNot(key, value, _):
            yield {full(key, section): value}
        case NotBelow(key, least, _):
            yield {key: least - 1}
        case AllOf(conditions):
            for number, one in enumerate(conditions):
                others = [setting for two in conditions[:number] for setting in on(two, section).items()]
                yield from ({**dict(others), **settings} for settings in off(one, section))
        case AnyOf(conditions):
            for settings in product(*(list(off(one, section)) for one in conditions)):
                yield {key: value for one in settings for key, value in one.items()}
        case Unless(_, _, inner):
            yield from off(inner, section)
        case Never():
            yield {}
        case SeveralReplicas():
            yield {"parallel.dp": 1}
            yield {"train.global_batch_size": 4, "train.micro_batch_size": 4}
        case _:
            raise AssertionError(condition)


def on(condition: Condition, section: str) -> Settings:
    """One way to make it hold."""
    match condition:
        case Is(key, values):
            return {full(key, section): values[0]}
        case IsNot(key, _, instead):
            return {full(key, section): instead}
        case NotBelow(key, _, example):
            return {key: example}
        case AllOf(conditions):
            return {key: value for one in conditions for key, value in on(one, section).items()}
        case AnyOf(conditions):
            return on(conditions[0], section)
        case Unless(_, _, inner):
            return on(inner, section)
    return {}


def cases() -> Iterator[tuple[str, int, int]]:
    """(key, number of its rule, number of the way to turn that off)."""
    for key in LEAVES:
        section = ".".join(key.path[:-1])
        for number, rule in enumerate(rules_of(key.path)):
            for way, _ in enumerate(off(rule.condition, section)):
                yield key.name, number, way


def mapping(settings: Settings) -> dict[str, Any]:
    """A small run with these settings; None is written as null."""
    data: dict[str, Any] = {section: dict(keys) for section, keys in minimal().items()}
    for key, value in settings.items():
        *sections, name = key.split(".")
        below = data
        for one in sections:
            below = below.setdefault(one, {})
        below[name] = value
    return data


def written_value(key: Key, settings: Settings, folder: Path) -> Any:
    """A legal value that would not stand there anyway."""
    root, _ = load_file(write(folder, dump_plain(mapping(settings)), "without.yaml"))
    stands = look_in(apply_presets(root)[0])(key.name)
    chosen = settings.get(key.name)  # a rule may be about the key itself
    values = [chosen] if chosen else legal_values(key)
    return next(value for value in values if value != stands and not is_neutral(key.path, value))


def test_what_asks_for_nothing_may_be_written() -> None:
    """O3 sends weights in FP8, and a validator asks for the opposite beside weights in the compute type."""
    one_rank = {"train.global_batch_size": 4, "precision.level": "O3"}
    for settings in (
        {"precision.weights": "compute", "precision.traffic.weights": "compute"},
        {"precision.traffic.activations": "compute", "parallel.zero": "none"},
    ):
        resolve_mapping(mapping({**one_rank, **settings}))
    with pytest.raises(ConfigError, match=r"parallel\.tp is 1"):
        resolve_mapping(mapping({"precision.level": "O2", "precision.traffic.activations": "fp8"}))


@pytest.mark.parametrize(("name", "number", "way"), [*cases()], ids=lambda part: str(part))
def test_what_nothing_reads_is_refused(tmp_path: Path, name: str, number: int, way: int) -> None:
    key = key_table().keys[name]
    section = ".".join(key.path[:-1])
    rule, *others = rules_of(key.path)[number], *rules_of(key.path)[:number]
    settings = {k: v for one in others for k, v in on(one.condition, section).items()}
    settings |= list(off(rule.condition, section))[way]
    if "recipe" in name:  # the rule excepts some
        settings[name] = "mse"
    settings[name] = written_value(key, {k: v for k, v in settings.items() if k != name}, tmp_path)
    path = write(tmp_path, dump_plain(mapping(settings)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    root, _ = load_file(path)
    node = root.find(key.path)
    assert node is not None
    lines = [line for line in str(caught.value).splitlines() if line.startswith(f"{node.origin}: {name}")]
    why = why_unread(key.path, look_in(apply_presets(root)[0]))
    assert why is not None
    remedy = f"remove it, or write {why.remedy}" if why.remedy else "remove it"
    assert len(lines) == 1, caught.value
    assert f": has no effect: {why.reason}" in lines[0]
    assert f"; {remedy} ({name}=null takes back what a file sets)" in lines[0]
    assert f" {name}" not in refusal(path, f"{name}=null"), "taken back, as the message says"


def refusal(path: Path, *overrides: str) -> str:
    """What is wrong; nothing, perhaps."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_later_place_takes_back_what_it_turns_off(tmp_path: Path) -> None:
    """Over a file (or a base file) that describes evaluation or FP8 GEMMs, the command line (or the file)
    turns it off; in one place, or the other way round, that is a contradiction."""
    base = write(tmp_path, MINIMAL + "  eval_interval: 5\n  eval_batches: 7\n", "base.yaml")
    run = write(tmp_path, "base: base.yaml\ntrain:\n  eval_interval: 0\n")
    default = schema_defaults()["train.eval_batches"]
    assert default != 7
    for resolved in (load_config(run), load_config(base, ["train.eval_interval=0"])):
        assert resolved.config.train.eval_batches == default
        assert not resolved.origins["train.eval_batches"].explicit
        said = f"train.eval_batches of {base}:16 is not read: train.eval_interval is 0"
        assert resolved.taken_back == (said,)
        assert f"# {said}\n" in explain(resolved, {})
    for path, overrides in (
        (base, ["train.eval_interval=0", "train.eval_batches=3"]),
        (run, ["train.eval_batches=3"]),
        (write(tmp_path, "base: base.yaml\ntrain: {eval_interval: 0, eval_batches: 9}\n", "both.yaml"), []),
    ):
        message = message_of(path, *overrides)
        assert "train.eval_batches, train.eval_interval: has no effect: train.eval_interval is 0" in message
    # What a preset turned off: the place counts where the preset was chosen.
    excluding = "precision: {level: LEVEL, gemm: {exclude: [layers.0.*]}}\n"
    o2 = write(tmp_path, MINIMAL + excluding.replace("LEVEL", "O2"), "o2.yaml")
    assert load_config(o2).config.precision.gemm.exclude == ("layers.0.*",)
    assert load_config(o2).taken_back == ()
    assert load_config(o2, ["precision.level=O0"]).config.precision.gemm.exclude == ()
    o0 = write(tmp_path, MINIMAL + excluding.replace("LEVEL", "O0"), "o0.yaml")
    assert "precision.gemm.exclude, precision.gemm.fp8: has no effect" in message_of(o0)
