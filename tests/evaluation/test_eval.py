"""``fp8train eval``: the loss that the run logged, beside that of BF16."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8train.cli import run_command
from fp8train.cli.train_command import train_command
from fp8train.data.errors import DataError
from fp8train.data.prepare import prepare
from fp8train.evaluation.options import EvalOptions
from fp8train.evaluation.perplexity import measure, open_text, relative_difference
from fp8train.inference.errors import InferenceError
from fp8train.inference.load import open_run
from fp8train.run_dir.metrics import read_metrics
from tests.inference.recipes import MARKED, RECIPES
from tests.training.launching import write_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
O2 = ("precision.level=O2",)
FP8 = ("precision.gemm.fp8=true",)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on tokens without a tokenizer."""
    return write_config(tmp_path_factory.mktemp("eval"))


def train(config: Path, name: str, *overrides: str) -> Path:
    """Train in this process; the run directory."""
    folder = config.parent
    always = (f"run.dir={folder}", f"run.name={name}", "checkpoint.interval=0", "run.overwrite=true")
    with ExitStack() as lifetime:
        assert train_command(config, [*always, *overrides], lifetime) == 0
    return folder / name


def logged(run: Path, key: str = "eval/loss") -> float:
    """What the run's last evaluation gave."""
    return next(row[key] for row in reversed(read_metrics(run / "metrics.jsonl")) if key in row)


def evaluated(run: Path, *options: str) -> dict[str, Any]:
    """The JSON of the command line."""
    report = run / "eval.json"
    report.unlink(missing_ok=True)
    assert run_command(["eval", str(run), "--device", "cpu", "--json", str(report), *options]) == 0
    return json.loads(report.read_text())


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        *(pytest.param(*param.values, ("precision.level=O1",), marks=param.marks) for param in MARKED),
        ("current", FP8),
        ("te_delayed", FP8),
    ],
)
def test_eval_gives_the_logged_loss(config: Path, recipe: str, overrides: tuple[str, ...]) -> None:
    run = train(config, f"logged_{recipe}", *overrides, *RECIPES[recipe], "train.steps=10")
    report = evaluated(run)
    matched, bf16 = report["results"]
    assert matched["loss"] == logged(run) != bf16["loss"]
    assert matched["perplexity"] == logged(run, "eval/perplexity")
    converted = 4 if recipe == "umup" else 8
    assert matched["operands"].startswith(f"FP8: {converted} of 9 linears") and recipe in matched["operands"]
    assert report["relative_difference"] == pytest.approx(
        matched["perplexity"] / bf16["perplexity"] - 1, rel=1e-9
    )
    assert matched["tokens"] == bf16["tokens"] == 2 * 8 * 32  # eval_batches x global batch x sequence


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_perplexity_is_close_to_bf16(config: Path, recipe: str) -> None:
    short = ("train.steps=200", "train.global_batch_size=4", "train.micro_batch_size=4", "optimizer.lr=0.003")
    overrides = (*O2, *short, *RECIPES[recipe], "train.eval_interval=0")
    run = open_run(train(config, f"close_{recipe}", *overrides))
    text = open_text(run, num_batches=16)
    fp8, bf16 = (measure(run, text, numerics, device=CPU) for numerics in ("matched", "bf16"))
    print(f"{recipe}: {fp8.perplexity} {bf16.perplexity}")
    assert bf16.perplexity < 3  # of 128: it has learnt the pattern, whose entropy is ln 2
    assert 0 < abs(relative_difference(fp8, bf16)) < 0.005


LAYOUTS = {
    "dp2-zero": ("precision.level=O3",),
    "pp2": (*O2, "parallel.pp=2"),
    "tp2": (*O2, "parallel.tp=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_hidden_size=256",
            "model.hidden_size=256"),
}  # fmt: skip


def train_in_pool(group: None, rank: int, world_size: int, config: Path, name: str) -> None:
    """Runs in the pool, with delayed scales: every rank has a part of their state or the whole."""
    train(config, name, *LAYOUTS[name], "precision.recipe=te_delayed", "train.steps=6")


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_process_evaluates_what_two_saved(gloo_pool, config: Path, name: str) -> None:
    """Tensor-parallel sums have another order than those of one process; the others are the same."""
    gloo_pool.run(train_in_pool, 2, config, name, join=False, timeout=120.0)
    run = config.parent / name
    matched, bf16 = evaluated(run)["results"]
    assert matched["loss"] == pytest.approx(logged(run), rel=1e-3 if name == "tp2" else 0, abs=0)
    assert matched["loss"] != bf16["loss"]


def test_other_samples_and_batch_sizes(config: Path) -> None:
    run = train(config, "samples", *FP8, "train.steps=4", "precision.recipe=te_delayed")
    usual = evaluated(run)
    one = evaluated(run, "--batches", "1")
    assert one["samples"] == 8 and one["results"][0]["loss"] != usual["results"][0]["loss"]
    single = evaluated(run, "--batch-size", "16", "--numerics", "matched")
    assert single["samples"] == usual["samples"] == 16 and single["relative_difference"] is None
    # Delayed scales do not depend on the batch; sums of BF16 products may be cut otherwise.
    assert single["results"][0]["loss"] == pytest.approx(usual["results"][0]["loss"], rel=1e-4)
    train_split = evaluated(run, "--split", "train")
    assert "(train: 48 documents" in train_split["text"]
    assert train_split["results"][0]["loss"] != usual["results"][0]["loss"]


def test_a_run_without_fp8(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``matched`` is its compute type; where that is BF16, there is one thing to measure."""
    run = train(config, "bf16", "train.steps=4")
    capsys.readouterr()
    [result] = evaluated(run)["results"]
    out, err = capsys.readouterr()
    assert result["loss"] == logged(run)
    assert out.startswith("matched | loss ") and "bf16 operands; trained without FP8 in bf16" in out
    assert len(out.splitlines()) == 1 and "step 4; " in err
    assert evaluated(run, "--numerics", "bf16")["results"][0]["loss"] == logged(run)
    wide = train(config, "fp32", "train.steps=4", "precision.compute=fp32")
    matched, bf16 = evaluated(wide)["results"]
    assert matched["loss"] == logged(wide) and matched["loss"] != bf16["loss"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on prepared text: with tokenizer and bytes per token."""
    folder = tmp_path_factory.mktemp("prepared")
    draw = random.Random(3)
    lines = [f"def f{draw.randrange(99)}(x): return x + {draw.randrange(9999)}\n\n" for _ in range(1500)]
    for name, start in (("text", 0), ("other", 700)):
        documents = [folder / f"{name}{i}.txt" for i in range(20)]
        for i, document in enumerate(documents):
            document.write_text("".join(lines[start + 40 * i : start + 40 * i + 40]))
        vocab_size = 300 if name == "text" else 290
        prepare(documents, folder / name, vocab_size=vocab_size, workers=1)
    config = folder / "run.yaml"
    config.write_text(
        f"""
model: {{family: llama, num_layers: 1, hidden_size: 32, num_heads: 2, num_kv_heads: 2}}
data: {{prefix: {folder / "text"}, seq_length: 32, split: [0.7, 0.3, 0]}}
optimizer: {{lr: 0.01}}
train: {{steps: 6, global_batch_size: 2, micro_batch_size: 2, eval_interval: 6}}
precision: {{level: O2}}
logging: {{tensorboard: false}}
run: {{threads: 1}}
"""
    )
    threads = torch.get_num_threads()
    train(config, "run")
    torch.set_num_threads(threads)
    return folder


def test_bits_per_byte_and_text(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = prepared / "run"
    matched, bf16 = evaluated(run)["results"]
    assert matched["loss"] == logged(run)
    assert matched["bits_per_byte"] == logged(run, "eval/bits_per_byte") != bf16["bits_per_byte"]
    out = capsys.readouterr().out.splitlines()
    assert f"| {matched['bits_per_byte']:.4f} bits/byte | {matched['tokens']:,} tokens | " in out[-3]
    assert out[-1].startswith("perplexity, matched against bf16: ")
    texts = []
    for numerics in ("matched", "bf16"):
        options = ["--prompt", "def", "--max-tokens", "8", "--device", "cpu", "--numerics", numerics]
        assert run_command(["generate", str(run), *options]) == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        assert ("FP8: 4 of 5" in printed.err) == (numerics == "matched")
        assert ("bf16 operands; trained in FP8" in printed.err) == (numerics == "bf16")
    assert all(text.startswith("def") for text in texts)


def test_a_moved_dataset_is_named(prepared: Path, tmp_path: Path) -> None:
    away = prepared / "away"
    away.mkdir()
    for file in prepared.glob("text.*"):
        shutil.move(file, away / file.name)
    try:
        with pytest.raises(InferenceError, match=r"text\.idx: no such file; .* name one with --prefix"):
            open_text(open_run(prepared / "run"))
        matched, _ = evaluated(prepared / "run", "--prefix", str(away / "text"))["results"]
        assert matched["loss"] == logged(prepared / "run")
    finally:
        for file in away.iterdir():
            shutil.move(file, prepared / file.name)
        away.rmdir()


def test_errors(config: Path, prepared: Path, tmp_path: Path) -> None:
    run = open_run(prepared / "run")
    with pytest.raises(InferenceError, match=r"nothing\.idx: no such file; check --prefix"):
        open_text(run, prefix=str(tmp_path / "nothing"))
    with pytest.raises(
        InferenceError, match=r"other was made with another tokenizer .* --tokenizer .*tokenizer\.model"
    ):
        open_text(run, prefix=str(prepared / "other"))
    with pytest.raises(DataError, match="no test split; choose train or valid"):
        open_text(run, "test")
    total = open_text(run, num_batches=5).num_samples
    assert total == 10
    with pytest.raises(
        InferenceError, match=r"--batch-size 4 does not divide the 10 samples .* that do: 2, 5"
    ):
        open_text(run, num_batches=5, batch_size=4)
    small = open_run(train(config, "small", "train.steps=1", "model.vocab_size=200"))
    with pytest.raises(
        InferenceError, match=r"has a vocabulary of 300 tokens, but the model in .* knows 200"
    ):
        open_text(small, prefix=str(prepared / "text"))


def test_user_errors_have_no_traceback(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["eval", str(prepared)]) == 2
    assert "holds no checkpoint; give a run directory" in capsys.readouterr().err
    assert run_command(["eval", str(prepared / "run"), "--json", "/nowhere/x.json", "--batches", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: --json /nowhere/x.json: its folder does not exist")
    assert run_command(["eval", str(prepared / "run"), "--numerics", "fp4"]) == 2
    assert "--numerics" in capsys.readouterr().err


def test_the_table_of_runs(config: Path, prepared: Path) -> None:
    """tools/inference_perplexity.py prints what the command measures."""
    plain = train(config, "plain", "train.steps=2")
    runs = [str(prepared / "run"), str(plain)]
    command = [
        sys.executable,
        str(ROOT / "tools/inference_perplexity.py"),
        "--device",
        "cpu",
        "--runs",
        *runs,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    _, _, fp8, none = done.stdout.splitlines()
    report = evaluated(prepared / "run")
    matched, bf16 = (result["perplexity"] for result in report["results"])
    tokens = f"{report['results'][0]['tokens']:,}"
    difference = f"{100 * report['relative_difference']:+.3f} %"
    assert fp8 == f"| current | O2 | 6 | {tokens} | {bf16:.4f} | {matched:.4f} | {difference} |"
    perplexity = evaluated(plain)["results"][0]["perplexity"]
    assert none == f"| no FP8 | O0 | 2 | 512 | {perplexity:.4f} |  |  |"


def test_progress_of_a_long_evaluation(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fp8train.evaluation.progress._SECONDS_BETWEEN_LINES", 0.0)
    run = open_run(prepared / "run")
    measure(run, open_text(run, num_batches=3), "bf16", device=CPU)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"bf16: {i} of 3 batches" for i in (1, 2, 3)]
    assert all(line.endswith(" tokens/s") for line in lines)


def test_a_text_may_come_through_a_pipe(tmp_path: Path) -> None:
    """As the shell's ``<(...)``: opening it to see what it is would already use it up."""
    os.mkfifo(tmp_path / "text")
    EvalOptions(numerics="bf16", text=[tmp_path / "text"]).check()
    with pytest.raises(InferenceError, match="not a file"):
        EvalOptions(numerics="bf16", text=[tmp_path]).check()
