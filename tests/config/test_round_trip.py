"""What is written out reads back the same; what editors and people are told about the keys is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp8train.config.dump import dump_plain, dump_yaml
from fp8train.config.editor_schema import dump_editor_schema, editor_schema
from fp8train.config.explain import explain, reference
from fp8train.config.keys import KeyTable
from fp8train.config.resolve import load_config, resolve_mapping, value_at
from fp8train.config.schema import Config
from fp8train.config.yaml_tree import parse_text
from tests.config.examples import MINIMAL, minimal, write

VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "fp8": ["precision.gemm.fp8=true", "precision.gemm.output.x.margin=3",
        "precision.gemm.keep_x=second_copy",
            "precision.gemm.exclude=[layers.0.*, '*.down']"],
    "fp8_recipe": ["precision.recipe=current", "precision.gemm={fp8: true, keep_x: bf16, min_dim: 64}"],
    "O1": ["precision.level=O1"],
    "O2_paper": ["precision.level=O2", "precision.profile=paper", "precision.gradient.fp8.accumulate=fp8"],
    "O1_paper": ["precision.level=O1", "precision.profile=paper"],
    "O2_lion": ["precision.level=O2", "precision.profile=paper", "optimizer.name=lion"],
    "O2_unbounded": ["precision.level=O2", "precision.state.bounded_update=false"],
    "O2_changed": ["precision.level=O2", "precision.state.exp_avg_sq={format: e4m3, sqrt: true}",
                   "precision.gradient.fp8.node_size=2", "precision.weights=compute"],
    "rows": ["precision.level=O3", "precision.recipe=rowwise"],
    "rows_gw_hp": ["precision.level=O3", "precision.recipe=rowwise_gw_hp"],
    "constants": ["precision.level=O2", "precision.recipe=cscale",
                  "precision.gemm.output.x.scale_source=current",
                  "precision.gemm.keep_x=second_copy"],
    "off_words": ["train.compile=off", "logging.wandb.mode=offline", 'run.name="010"', 'run.dir="no"',
                  "logging.wandb.entity=on"],
    "blend": ["data.prefix=null", "data.blend=[{prefix: 'a: b', weight: 1e-7}, {prefix: \"ü#\", weight: 3}]"],
    "rope": ["model.rope_scaling={factor: 32.0}", "data.tokenizer=\"\"", "run.threads=2"],
    "tokens": ["train.steps=null", "train.tokens=10000000000000000", "parallel.dp=2",
               "optimizer.eps=1e-300"],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_dump_loads_to_the_same_config(name: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), VARIANTS[name]).config
    text = dump_yaml(config)
    again = load_config(write(tmp_path, text, "again.yaml"))
    assert again.config == config
    assert dump_yaml(again.config) == text


def test_dump_is_complete_where_fp8_is_on(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["precision.level=O2"]).config
    everything = json.loads(config.model_dump_json())
    assert set(everything.pop("deepspeed").values()) <= {None, "none"}  # of another engine
    assert parse_text(dump_yaml(config), "x").plain() == everything


def test_dump_quotes_what_other_readers_misread() -> None:
    assert dump_plain({"a": "off", "b": "010", "c": "bf16", "d": [1, "no"], "e": 1e-5, "f": None}) == (
        'a: "off"\nb: "010"\nc: bf16\nd: [1, "no"]\ne: 1e-05\nf: null\n'
    )


def test_origins_cover_every_leaf_and_nothing_else() -> None:
    resolved = resolve_mapping(minimal(), ["model.rope_scaling.factor=4"])
    assert list(resolved.origins) == [key.name for key in KeyTable().leaves()]
    without = resolve_mapping(minimal())
    assert "model.rope_scaling" in without.origins
    assert "model.rope_scaling.factor" not in without.origins


def test_defaults_are_those_of_the_schema() -> None:
    """A value with origin "default" equals the schema's default, section by section."""
    resolved = resolve_mapping(minimal())
    for key in KeyTable().leaves():
        if str(resolved.origins.get(key.name)) == "default":
            value = value_at(resolved.config, key.path)
            shown = list(value) if isinstance(value, tuple) else value
            assert shown == key.fragment["default"], key.name


def test_explain_shows_value_and_origin(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    text = explain(load_config(path, ["run.seed=5"]), {})
    rows = {
        line.split()[0]: line.split(maxsplit=2)[1:]
        for line in text.splitlines()
        if "." in line.split("  ")[0]
    }
    assert rows["run.seed"] == ["5", "command line"]
    assert rows["optimizer.lr"] == ["0.0003", f"{path}:10"]
    assert rows["model.bias"] == ["false", "preset model.family=llama"]
    assert rows["model.head_dim"] == ["16", "derived from model.hidden_size / model.num_heads"]
    assert "precision.gemm.output.x.format" not in rows
    assert "\x1b" not in text
    hidden = "# 124 settings without effect are not shown: precision.gemm.fp8 is false; engine is native"
    assert text.splitlines()[-1] == hidden
    fp8 = explain(load_config(path, ["precision.gemm.fp8=true"]), {})
    assert "precision.gemm.grad_input.grad_output.format" in fp8
    assert "precision.gradient.fp8.block" not in fp8
    assert "not shown: precision.gradient.format is high_precision; " in fp8.splitlines()[-1]
    all_in_fp8 = explain(load_config(path, ["precision.level=O2"]), {})
    assert all_in_fp8.splitlines()[-1].endswith("are not shown: engine is native")
    exact = explain(load_config(path, ["precision.level=O1"]), {}).splitlines()[-1]
    bound = "precision.state.exp_avg.format is fp32 and precision.state.exp_avg_sq.format is fp32"
    assert exact == f"# 4 settings without effect are not shown: {bound}; engine is native"


def test_reference_lists_every_key_with_its_documentation() -> None:
    text = reference()
    for key in KeyTable().leaves():
        assert key.description, key.name
        assert sum(line.startswith(f"| `{key.name}` |") for line in text.splitlines()) == 1, key.name
    assert "| `optimizer.lr` | a number > 0 | **required** | Peak learning rate. |" in text


def _accepts(schema: dict[str, Any], data: Any) -> bool:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install 'fp8train[dev]'")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    return bool(validator(schema).is_valid(data))


def test_editor_schema_accepts_what_a_user_writes() -> None:
    schema = editor_schema()
    assert _accepts(schema, minimal())
    assert _accepts(schema, {"base": "llama.yaml"})
    assert _accepts(schema, {"base": ["a.yaml", "b.yaml"], "model": {"num_layers": 3}})
    assert _accepts(
        schema, {**minimal(), "precision": {"gemm": {"fp8": True, "output": {"x": {"margin": 1}}}}}
    )
    assert not _accepts(schema, {"model": minimal()["model"]})
    assert not _accepts(schema, {**minimal(), "optimizer": {}})
    assert not _accepts(schema, {"base": "x", "optimizer": {"lerning_rate": 1}})
    assert not _accepts(schema, {"base": 3})


def test_editor_schema_requires_only_what_no_preset_fills() -> None:
    schema = json.loads(dump_editor_schema())
    assert "base" in schema["properties"]
    assert set(schema["properties"]) == {"base", *Config.model_fields}
    assert schema["then"]["required"] == ["model", "data", "optimizer", "train"]
    assert schema["then"]["properties"]["model"]["required"] == [
        "family",
        "num_layers",
        "hidden_size",
        "num_heads",
    ]
    assert [name for name, part in schema["$defs"].items() if "required" in part] == ["BlendEntry"]
