"""Whole by their hashes, and yet altered: descriptions and manifests with values that nobody wrote.

Whatever stands there, a reader gets one error of ours that names file and key, or values that it can use.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fp8train.checkpoint import retention
from fp8train.checkpoint.catalog import find_checkpoint
from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CheckpointError, NoGoodCheckpointError
from fp8train.checkpoint.manifest import read_manifest
from fp8train.config.errors import UserError
from fp8train.inference.load import _description
from fp8train.training.initialise import _check_same_model
from fp8train.training.preflight import settings_changes
from fp8train.training.restore import _operands, _roots
from tests.training.test_continue import save, start

Keys = tuple[str | int, ...]


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"x": value}
    return value


VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "a string": "7",
    "an empty string": "",
    "a list": [1, [2]],
    "an object": {"steps": 3},
    "NaN": float("nan"),
    "infinite": float("inf"),
    "negative": -1,
    "huge": 10**400,
    "a fraction": 2.5,
    "deep": _deep(300),
    "not Unicode": "\ud800",
}


def _places(value: Any, at: Keys = ()) -> Iterator[Keys]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield (*at, key)
            yield from _places(below, (*at, key))
    elif isinstance(value, list) and value:
        yield (*at, 0)
        yield from _places(value[0], (*at, 0))


def _with(content: Any, place: Keys, value: Any, *, drop: bool = False) -> Any:
    content = copy.deepcopy(content)
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    if drop:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


def _sign(path: Path, **changes: Any) -> None:
    manifest = path / "manifest.json"
    content = json.loads(manifest.read_bytes())["content"]
    data = (path / "meta.json").read_bytes()
    content["files"]["meta.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _write_manifest(path, content | changes)


def _write_manifest(path: Path, content: Any) -> None:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    whole = {"content": content, "sha256": digest}
    (path / "manifest.json").write_bytes((json.dumps(whole, indent=1, sort_keys=True) + "\n").encode())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A checkpoint with everything in its description that a run may write; configuration, trainer, data."""
    settings = ["precision.gemm.fp8=true", "precision.guard.action=bf16", "spikes.action=warn"]
    config, trainer, data = start([*settings, "logging.cast_statistics_interval=1"])
    trainer.step(0, data.batch(0))
    data.leave_out([(40, 48)])
    path = save(config, trainer, data, tmp_path_factory.mktemp("altered"))
    content = json.loads((path / "meta.json").read_bytes())
    state = content["meta"]["trainer"]
    linear = next(iter(trainer.model.linears()))
    state["guard"] = {
        "locked": {linear: 9},
        "current": {linear: 9},
        "levels": {linear: [0, 9]},
        "actions": 1,
        "usual": [[f"{linear}/x", "amax", 1.5, 3]],
    }
    state["spikes"] = {"loss": [2.5], "grad_norm": [1.0], "told": None}
    content["meta"] |= {"eval_loss": 2.5, "tokenizer": None, "finite": True}
    return path, content, (config, trainer, data)


def _use(path: Path, run: Any) -> None:
    """All that a run, a restart from weights, inference and retention do with a description."""
    config, trainer, data = run
    _, meta = read_meta_file(path)
    retention._eval_loss(path)
    _roots(meta), _operands(meta.get("config", {}))
    _check_same_model(meta.get("config"), config, path)
    _description(path, meta)
    settings_changes(meta, config, path)
    data.load_state_dict(meta["data"])
    try:
        trainer.check_meta(meta["trainer"])
    except ValueError:
        return  # what resume() tells the user
    trainer.monitors.load_state(meta["trainer"])
    json.dumps(trainer.state_meta())


def test_what_was_not_altered_is_used(made: Any) -> None:
    path, content, run = made
    (path / "meta.json").write_text(json.dumps(content))
    _use(path, run)


def test_every_altered_value_is_one_error_or_none(made: Any) -> None:
    path, content, run = made
    generator, refused, tried = random.Random(3), 0, 0
    told: list[tuple[Keys, str, str, bool]] = []
    for place in _places(content):
        leaf = len(place) > 3 and place[:2] == ("meta", "config")
        names = generator.sample(sorted(VALUES), 2) if leaf and place[2] not in ("train", "data") else VALUES
        for name in [*names, "drop"]:
            altered = _with(content, place, VALUES.get(name), drop=name == "drop")
            (path / "meta.json").write_text(json.dumps(altered))
            tried += 1
            try:
                _use(path, run)
            except CheckpointError as error:
                refused += 1
                told.append((place, name, str(error), str(path) in str(error)))
            except UserError as error:
                told.append((place, name, str(error), True))
            except Exception as error:
                told.append((place, name, repr(error), False))
    wrong = [one for one in told if not one[3] or len(one[2].splitlines()) > 5]
    assert wrong == [], f"{len(wrong)}: {wrong[:5]}"
    assert tried > 1000
    assert refused > 300


@pytest.mark.parametrize(
    ("place", "name", "words"),
    [
        (("step",), "a string", "step: "),
        (("meta", "data", "samples"), "null", "meta.data.samples: "),
        (("meta", "data", "left_out", 0), "a string", "meta.data.left_out.0"),
        (("meta", "trainer", "updates"), "huge", "meta.trainer.updates: "),
        (("meta", "trainer", "guard", "usual"), "an object", "meta.trainer.guard.usual: "),
        (("meta", "config", "train"), "null", "meta.config: train is not a section"),
        (("meta", "config", "train", "steps"), "a fraction", "meta.config: train.steps: "),
        (("meta",), "deep", "nested deeper than 100 levels"),
    ],
)
def test_file_and_key_are_named(made: Any, place: Keys, name: str, words: str) -> None:
    path, content, _ = made
    (path / "meta.json").write_text(json.dumps(_with(content, place, VALUES[name])))
    _sign(path)
    for resume in ("auto", str(path)):
        with pytest.raises((CheckpointError, NoGoodCheckpointError)) as caught:
            find_checkpoint(path.parent, resume)
        assert "meta.json: damaged: " in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe{}", b"[" * 100_000, b"{", b"3", b"1e999", b"\x00"])
def test_what_is_no_json_object(made: Any, data: bytes) -> None:
    path = made[0]
    (path / "meta.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"meta\.json: damaged: "):
        read_meta_file(path)


def test_every_altered_manifest_is_one_error(made: Any) -> None:
    path, content, _ = made
    (path / "meta.json").write_text(json.dumps(content))
    _sign(path)
    good = json.loads((path / "manifest.json").read_bytes())["content"]
    used = []
    for place in _places(good):
        for name in [*VALUES, "drop"]:
            _write_manifest(path, _with(good, place, VALUES.get(name), drop=name == "drop"))
            with suppress(CheckpointError):
                find_checkpoint(path.parent, str(path))
                used.append((place, name))
    told_only = {"torch", "fp8train", "world_size"}  # nothing here depends on them
    assert {place[0] for place, _ in used} <= told_only, used
    assert all(name in ("a string", "an empty string", "not Unicode", "huge") for _, name in used), used
    _write_manifest(path, good)
    assert read_manifest(path).step == 3
