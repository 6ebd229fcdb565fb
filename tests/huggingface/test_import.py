"""An imported model computes what transformers computes, and what cannot be is refused with key and value."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8train.config.resolve import load_config
from fp8train.huggingface.config_json import ConfigJson, read_config
from fp8train.huggingface.errors import HuggingFaceError
from fp8train.huggingface.find_architecture import architecture_of_config
from fp8train.huggingface.importing import import_command
from fp8train.huggingface.parity import decoder_in_fp32
from fp8train.inference.load import TrainedRun, open_run
from tests.checkpoint.loading import load_checkpoint
from tests.huggingface.models import VARIANTS, VOCAB, logits_of, their_model, tokens_of
from tests.models.hf_mapping import to_gpt2, to_llama, to_neox

CPU = torch.device("cpu")


def imported(folder: Path, run: Path) -> TrainedRun:
    assert import_command(folder, output=run, check=False, text=None) == 0
    return open_run(run)


def our_logits(run: TrainedRun, tokens: Tensor) -> Tensor:
    return decoder_in_fp32(run, run.states().read).logits(tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    theirs = their_model(variant)
    theirs.save_pretrained(tmp_path / "hf")
    run = imported(tmp_path / "hf", tmp_path / "run")
    tokens = tokens_of(run.vocab_size)
    expected = logits_of(theirs, tokens)
    assert expected.std() > 0.1, "weights too small for the comparison to mean anything"
    assert (our_logits(run, tokens) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("variant", "to_theirs"),
    [
        ("llama, untied", to_llama),
        ("llama, tied, one kv head", to_llama),
        ("llama, wide heads, several shard units", to_llama),
        ("gpt2", to_gpt2),
        ("neox", lambda tensors, model: to_neox(tensors, model, head="lm_head.weight")),
    ],
)
def test_master_weights_have_the_bits_of_the_file(tmp_path: Path, variant: str, to_theirs: Any) -> None:
    """Permuted back by another implementation of the map."""
    theirs = their_model(variant)
    theirs.save_pretrained(tmp_path / "hf")
    run = imported(tmp_path / "hf", tmp_path / "run")
    states = run.states()
    masters = {fqn: states.read(fqn) for fqn in states.model.specs}
    found = to_theirs(masters, run.config.model)
    expected = theirs.state_dict()
    assert set(found) | {"lm_head.weight"} == set(expected) | {"lm_head.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    padding = masters["embedding.weight"][run.vocab_size :]
    assert padding.shape[0] == 128 - VOCAB
    assert padding.count_nonzero() == 0


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FP32 masters under the names of a run at O0, a description, and a file to train from."""
    their_model("llama, llama3 rope").bfloat16().save_pretrained(tmp_path / "hf")
    config_file = tmp_path / "hf" / "config.json"
    values = json.loads(config_file.read_text()) | {"is_llama_config": True}
    config_file.write_text(json.dumps(values))
    run = imported(tmp_path / "hf", tmp_path / "run")
    out = capsys.readouterr().out
    stored = torch.zeros(128, 32)
    loaded = load_checkpoint(run.path, {"master/head.weight": stored}, group=None, allow_unexpected=True)
    assert torch.equal(
        stored[:VOCAB].bfloat16(), load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"]
    )
    assert (run.path.name, loaded.step, loaded.meta["vocab_size"]) == ("step_00000000", 0, VOCAB)
    for config in (run.config, load_config(tmp_path / "run" / "train.yaml").config):
        model = config.model
        assert model.rope_scaling is not None
        assert (model.rope_theta, model.rope_scaling.original_max_seq_len) == (50.0, 28)
        assert (model.num_kv_heads, model.max_seq_len, config.data.seq_length) == (2, 40, 40)
        assert (model.norm_eps, model.init_std) == (1e-6, 0.1)
    parameters = 2 * 61 * 32 + 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert f"{parameters:,} parameters" in out
    assert "without meaning to transformers' class, so to none here: is_llama_config=true" in out


def test_shards_older_names_and_bare_models(tmp_path: Path) -> None:
    """As the original GPT-2 is stored: no prefix, buffers of the causal mask; here in several files too."""
    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    for file in set(weight_map.values()):
        tensors = load_file(tmp_path / "hf" / file)
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        bare |= {
            name.replace("c_attn.weight", "bias"): torch.ones(1, 1, 40, 40)
            for name in bare
            if name.endswith("c_attn.weight")
        }
        save_file(bare, tmp_path / "hf" / file)
    bare_map = {name.removeprefix("transformer."): file for name, file in weight_map.items()}
    index.write_text(json.dumps({"weight_map": bare_map}))
    run = imported(tmp_path / "hf", tmp_path / "run")
    assert (our_logits(run, tokens_of()) - logits_of(theirs, tokens_of())).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", ["llama, llama3 rope", "neox"])
def test_rope_settings_of_older_versions(tmp_path: Path, variant: str) -> None:
    theirs = their_model(variant)
    theirs.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")
    if variant == "neox":
        values |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": 1.0}
    else:
        values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    file.write_text(json.dumps(values))
    run = imported(tmp_path / "hf", tmp_path / "run")
    assert (our_logits(run, tokens_of()) - logits_of(theirs, tokens_of())).abs().max() <= 1e-5


LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEOX = {**LLAMA, "model_type": "gpt_neox", "use_parallel_residual": False, "rotary_pct": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**LLAMA, "model_type": "mamba"}, 'model_type: "mamba" cannot be imported: known: llama, mistral'),
        (
            {**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
            "only LlamaForCausalLM is a language",
        ),
        ({**LLAMA, "hidden_act": "gelu"}, 'hidden_act: "gelu" cannot be imported: this decoder has silu'),
        ({**LLAMA, "attention_bias": True}, "mlp_bias: false cannot be imported: this decoder has biases"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.rope_type: "linear"'),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters.rope_type: "yarn"'),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 cannot be imported"),
        ({**LLAMA, "model_type": "mistral"}, "sliding_window: 4096 cannot be imported: this decoder's"),
        ({**LLAMA, "auto_map": {"AutoModel": "x.Y"}}, "auto_map: {"),
        (
            {**LLAMA, "quantization_config": {"quant_method": "fp8"}},
            'quantization_config.quant_method: "fp8"',
        ),
        ({**LLAMA, "hidden_size": "32"}, 'hidden_size: "32" is not a positive number'),
        ({**LLAMA, "tie_word_embeddings": 1}, "tie_word_embeddings: 1 is neither true nor false"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "vocab_size is missing"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true cannot"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights: false cannot be imported"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention: true cannot be imported"),
        ({**GPT2, "activation_function": "relu"}, 'activation_function: "relu" cannot be imported'),
        ({**NEOX, "use_parallel_residual": True}, "use_parallel_residual: true cannot be imported"),
        ({k: v for k, v in NEOX.items() if k != "rotary_pct"}, "rotary_pct: 0.25 cannot be imported"),
        ({**NEOX, "attention_bias": False}, "attention_bias: false cannot be imported"),
    ],
)
def test_settings_that_this_decoder_does_not_have(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(HuggingFaceError) as caught:
        import_command(tmp_path, output=tmp_path / "run", check=False, text=None)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert not (tmp_path / "run").exists()


def test_the_settings_above_are_legal_without_their_change(tmp_path: Path) -> None:
    for values in (LLAMA, GPT2, NEOX):
        config = ConfigJson(tmp_path, dict(values))
        assert architecture_of_config(config).settings(config)["vocab_size"] == 61
        assert config.unread() == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    their_model("llama, untied").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (
            lambda t: t.update({"extra.weight": torch.ones(1)}),
            "extra.weight has no place in LlamaForCausalLM",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(61, 31)}),
            "lm_head.weight is [61, 31], config.json says [61, 32]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(61, 32, dtype=torch.int8)}),
            "lm_head.weight is I8, not a floating-point number",
        ),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, tmp_path: Path, change: Any, message: str) -> None:
    change_tensors(saved, change)
    with pytest.raises(HuggingFaceError) as caught:
        import_command(saved, output=tmp_path / "run", check=False, text=None)
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    theirs = their_model("llama, tied, one kv head")
    folder = tmp_path / "hf"
    theirs.save_pretrained(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    run = imported(folder, tmp_path / "run")
    assert (our_logits(run, tokens_of()) - logits_of(theirs, tokens_of())).abs().max() <= 1e-5
    change_tensors(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(HuggingFaceError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        import_command(folder, output=tmp_path / "other", check=False, text=None)


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_pickled_weights_are_refused_and_not_opened(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Malicious()}, saved / "pytorch_model.bin")
    with pytest.raises(HuggingFaceError, match=r"a pickle can run code.*\n.*save_pretrained"):
        import_command(saved, output=tmp_path / "run", check=False, text=None)
    assert not (tmp_path / "executed").exists()


def test_files_that_are_not_what_they_should_be(saved: Path, tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(HuggingFaceError) as caught:
            import_command(saved, output=tmp_path / "run", check=False, text=None)
        return str(caught.value)

    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../hf/model.safetensors"}}))
    assert "'../hf/model.safetensors' is not the name of a file beside it" in refused()
    index.write_text("{}")
    assert "not an index of safetensors files" in refused()
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors" in refused()
    index.unlink()
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-1])
    assert "not a safetensors file, or cut short" in refused()
    (saved / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor" in refused()
    (saved / "config.json").write_text("{")
    assert "not JSON" in refused()
    (saved / "config.json").write_text("[" * 100_000)
    assert "not JSON" in refused()
    (saved / "config.json").unlink()
    assert "give the folder of a model" in refused()


def test_a_folder_with_something_in_it_is_not_written_to(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(HuggingFaceError, match="exists and is not empty"):
        import_command(saved, output=tmp_path / "run", check=False, text=None)
    (tmp_path / "run" / "mine").unlink()
    assert import_command(saved, output=tmp_path / "run", check=False, text=None) == 0


def test_a_wrong_import_is_noticed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity check, on by default, fails where keys and values are exchanged; nothing is left behind."""
    from fp8train.huggingface import llama

    right = llama.vectors

    def wrong(ours: str, *theirs: str, **rest: Any) -> Any:
        return right(ours, *((theirs[0], theirs[2], theirs[1]) if len(theirs) == 3 else theirs), **rest)

    monkeypatch.setattr(llama, "vectors", wrong)
    with pytest.raises(HuggingFaceError, match=r"largest difference of a logit .*\nthe two models differ"):
        import_command(saved, output=tmp_path / "run", check=None, text=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_only_our_lines_are_printed(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers warns of such ids and generation flags; the comparison does not depend on them."""
    change_config(saved, bos_token_id=700, eos_token_id=900, pad_token_id=-1)
    (saved / "generation_config.json").write_text('{"temperature": 0.1, "do_sample": false}')
    assert import_command(saved, output=tmp_path / "run", check=True, text=None) == 0
    out, err = capfd.readouterr()
    assert err == ""
    starts = ["LlamaForCausalLM from ", "tokenizer: ", "parity with transformers ", "continue its training: "]
    assert [line.startswith(start) for line, start in zip(out.splitlines(), starts, strict=True)] == [
        True
    ] * 4


@pytest.mark.slow
def test_nothing_that_is_imported_prints(saved: Path, tmp_path: Path) -> None:
    """In a process of its own: torchao and torch speak when transformers imports them."""
    words = ["import", "hf", str(saved), "--output", str(tmp_path / "run"), "--check"]
    done = subprocess.run(
        [sys.executable, "-m", "fp8train", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize(
    "values",
    [{"attention_bias": None}, {"torch_dtype": "auto", "dtype": None}, {"tie_word_embeddings": None}],
)
def test_whatever_transformers_raises_is_one_line(
    saved: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    """A TypeError or AttributeError of another library, about a file of the user's."""
    change_config(saved, **values)
    with pytest.raises(HuggingFaceError, match=r"^transformers .* cannot load .* with --no-check$") as caught:
        import_command(saved, output=tmp_path / "run", check=True, text=None)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_config_json_of_transformers_own_defaults_is_read_whole(tmp_path: Path) -> None:
    """Every key that this version of transformers writes is known here."""
    for variant in VARIANTS:
        folder = tmp_path / variant
        their_model(variant).config.save_pretrained(folder)
        config = read_config(folder)
        architecture_of_config(config).settings(config)
        assert config.unread() == [], variant
