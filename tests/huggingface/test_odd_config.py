"""A config.json of anything: every key with every kind of value is taken, or refused shortly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8train.config.errors import UserError
from fp8train.huggingface.config_json import read_config
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.find_architecture import architecture_of_config
from fp8train.huggingface.train_file import imported_config

CONTENT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "quantization_config": None,
    "rope_parameters": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
NESTED = "NESTED"
VALUES = (None, True, -1, 0, 1.5, 10**12, 10**400, "", "x" * 5000, [], {}, [None], {"a": None}, NESTED)


def outcome(folder: Path, text: str) -> str:
    (folder / "config.json").write_text(text)
    message = ""
    try:
        config = read_config(folder)
        imported_config(architecture_of_config(config).settings(config), str(config.path))
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 5
    assert len(message) < 1500
    return "refused" if message else "taken"


def test_every_key_with_every_kind_of_value(tmp_path: Path) -> None:
    assert outcome(tmp_path, json.dumps(CONTENT)) == "taken"
    places = [(key,) for key in CONTENT] + [("rope_parameters", key) for key in CONTENT["rope_parameters"]]
    found: dict[tuple[str, ...], set[object]] = {place: set() for place in places}
    for place in places:
        for number, value in enumerate(VALUES):
            content = json.loads(json.dumps(CONTENT))
            target = content if len(place) == 1 else content[place[0]]
            target[place[-1]] = value
            text = json.dumps(content).replace(f'"{NESTED}"', "[" * 40 + "]" * 40)
            if outcome(tmp_path, text) == "taken":
                found[place].add(number)
    huge = {VALUES.index(10**12), VALUES.index(10**400)}
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "head_dim")
    assert [place for place in sizes if found[place,] & huge] == []
    assert VALUES.index(None) in found["rope_theta",]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' is there twice"),
        ('{"model_type": NaN}', "NaN, which JSON does not have"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_is_no_config(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HuggingFaceError, match=reason):
        read_config(tmp_path)
