"""The two commands as a person uses them: tokenizers, reports, and what an imported model can do."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fp8train.cli import run_command
from fp8train.config.resolve import load_config
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.tokenizer_training import train_sentencepiece
from tests.huggingface.models import logits_of, their_model, transformers

tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers: pip install 'fp8train[hf]'")

TEXT = "".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(200))
PROBES = ("def f(x):\n    return x  + 1\n\n\t# é 世界\n", " hello", "<|endoftext|>\r\n")


def byte_level_tokenizer(folder: Path) -> None:
    """A tokenizer.json with an end-of-document token."""
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"])
    model.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of its vocabulary."""
    found = tmp_path_factory.mktemp("model") / "hf"
    their_model("llama, untied", vocab_size=300).save_pretrained(found)
    byte_level_tokenizer(found)
    return found


def test_round_trip_with_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports name tokens, parity and perplexity; perplexity by hand; the tokenizer survives."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    run, back = tmp_path / "run", tmp_path / "back"
    assert (
        run_command(["import", "hf", str(folder), "--output", str(run), "--check", "--text", str(text)]) == 0
    )
    out = capsys.readouterr().out
    assert "LlamaForCausalLM from" in out
    assert "tokenizer: tokenizer.json, 300 tokens, documents end with 0" in out
    found = re.search(r"perplexity of 1,024 tokens: (\S+) here, (\S+) with transformers", out)
    assert found is not None
    tokens = torch.tensor(load_tokenizer(folder / "tokenizer.json").encode(TEXT)[:1025])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for start in range(0, 1024, 40):  # the model's context
        piece = tokens[start : start + 41]
        total += float(F.cross_entropy(logits_of(model, piece[None, :-1])[0], piece[1:], reduction="sum"))
    assert float(found[1]) == pytest.approx(math.exp(total / 1024), rel=1e-4)
    assert float(found[2]) == pytest.approx(float(found[1]), rel=1e-5)

    words = ["export", "hf", str(run), "--output", str(back), "--dtype", "fp8_tensor", "--text", str(text)]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "fp8_tensor: 8 matrices in E4M3, the rest in BF16" in out
    assert re.search(
        r"rounding FP32 masters to fp8_tensor moves a logit by \S+ at most, perplexity from", out
    )
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    loaded = transformers.AutoTokenizer.from_pretrained(back)
    ours = load_tokenizer(run / "tokenizer.json")
    assert (loaded.eos_token_id, len(loaded), loaded.model_max_length) == (0, 300, 40)
    assert all(loaded.encode(probe, add_special_tokens=False) == ours.encode(probe) for probe in PROBES[:2])
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 0


def test_an_imported_model_generates_and_evaluates(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_command(["import", "hf", str(folder), "--output", str(run), "--no-check"]) == 0
    capsys.readouterr()
    words = ["generate", str(run), "--prompt", "def f", "--max-tokens", "8", "--temperature", "0"]
    assert run_command([*words, "--device", "cpu"]) == 0
    generated = capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    prompt = torch.tensor([tokenizer.encode("def f")])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0)
    assert generated.strip() == tokenizer.decode(expected[0].tolist()).strip()

    (tmp_path / "text.txt").write_text(TEXT)
    prefix = str(tmp_path / "data")
    words = ["data", "prepare", str(tmp_path / "text.txt"), "--output", prefix, "--workers", "1"]
    assert run_command([*words, "--tokenizer", str(run / "tokenizer.json")]) == 0
    capsys.readouterr()
    words = ["eval", str(run), "--prefix", prefix, "--split", "train", "--batches", "1", "--device", "cpu"]
    assert run_command(words) == 0
    assert re.search(r"loss 5\.\d+ nats/token .* 320 tokens .* bf16 operands", capsys.readouterr().out)


def test_the_training_file_trains(folder: Path, tmp_path: Path) -> None:
    """It is a whole configuration at O2 of the imported model."""
    run = tmp_path / "run"
    assert run_command(["import", "hf", str(folder), "--output", str(run), "--no-check"]) == 0
    config = load_config(run / "train.yaml", [f"run.dir={tmp_path}"]).config
    assert (config.precision.level, config.precision.gemm.fp8) == ("O2", True)
    assert (config.model.vocab_size, config.model.num_kv_heads) == (300, 2)
    assert str(run) in (run / "train.yaml").read_text()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Any) -> None:
    """A BPE model gets a description with which transformers encodes as we do; others are told about."""
    source, size, text = tmp_path / "hf", 340, Path(__file__).read_text()
    their_model("llama, untied", vocab_size=size).save_pretrained(source)
    (source / "tokenizer.model").write_bytes(train_sentencepiece([text], vocab_size=size, model_type=kind))
    run, back = tmp_path / "run", tmp_path / "back"
    assert run_command(["import", "hf", str(source), "--output", str(run), "--no-check"]) == 0
    assert run_command(["export", "hf", str(run), "--output", str(back), "--no-check"]) == 0
    told = "transformers has no class for it: read it with sentencepiece"
    assert (told in capsys.readouterr().out) == (kind == "unigram")
    assert (back / "tokenizer_config.json").exists() == (kind == "bpe")
    if kind == "unigram":
        return
    ours = load_tokenizer(back / "tokenizer.model")
    loaded = transformers.AutoTokenizer.from_pretrained(back)
    assert (len(loaded), loaded.eos_token_id) == (size, ours.eod_id)
    for probe in PROBES[:2]:
        assert loaded.encode(probe) == ours.encode(probe)
        assert loaded.decode(ours.encode(probe)) == probe


def test_tokenizers_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "hf"
    their_model("llama, untied").save_pretrained(source)  # 61 tokens
    assert run_command(["import", "hf", str(source), "--output", str(tmp_path / "a"), "--no-check"]) == 0
    assert f"put one into {tmp_path / 'a'} to generate" in capsys.readouterr().out
    byte_level_tokenizer(source)
    assert run_command(["import", "hf", str(source), "--output", str(tmp_path / "b"), "--no-check"]) == 0
    assert "it has 300 tokens and the model knows 61: it belongs to another model" in capsys.readouterr().out
    (source / "tokenizer.json").write_text("{}")
    assert run_command(["import", "hf", str(source), "--output", str(tmp_path / "c"), "--no-check"]) == 0
    assert "copied, but not usable here" in capsys.readouterr().out


def test_without_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is compared, and asking for it is an error."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    words = ["import", "hf", str(folder), "--output", str(tmp_path / "run")]
    assert run_command([*words, "--check"]) == 2
    assert "--check compares with transformers: pip install 'fp8train[hf]'" in capsys.readouterr().err
    assert run_command([*words, "--text", "x"]) == 2
    assert "--text needs the comparison" in capsys.readouterr().err
    assert run_command(words) == 0
    assert "parity" not in capsys.readouterr().out
