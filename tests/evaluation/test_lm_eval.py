"""lm-eval through the adapter, on tasks of this directory: no network."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8train.comm.collectives import alone
from fp8train.evaluation.scoring import score
from fp8train.evaluation.tasks import encode_task, read_task, task_metrics
from fp8train.inference.errors import InferenceError
from tests.evaluation.test_scoring import questions
from tests.inference.trained import sentence, train_small

lm_eval = pytest.importorskip("lm_eval", reason="runs lm-eval: pip install 'fp8train[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from fp8train.evaluation.lm_eval_adapter import Fp8TrainLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "local_generation": """
output_type: generate_until
doc_to_text: query
doc_to_target: answer
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


FILES = {"local_choice": "choice", "local_rolling": "texts", "local_generation": "asked"}
RIGHT = 3
"""Of eight questions, how many ask for what the model says."""


@torch.no_grad()
def likeliest(model: Fp8TrainLM, query: str, tokens: int) -> str:
    """The likeliest token after another, each from a forward of the whole text, up to the first full stop."""
    ids, size = model.tokenizer.encode(query), model.tokenizer.vocab_size
    ids = ids[-(model.max_length + 1 - tokens) :]
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(model.model.logits(torch.tensor([ids]))[0, -1, :size].argmax()))
        if ids[-1] == model.tokenizer.eod_id:
            ids.pop()
            break
    return model.tokenizer.decode(ids[start:]).split(".")[0]


def write_asked(folder: Path) -> None:
    """Questions whose answers are the model's own for the first ones, and others' for the rest."""
    model = Fp8TrainLM(str(folder / "run"), "bf16", device="cpu")
    queries = [json.loads(line)["query"] for line in (folder / "choice.jsonl").read_text().splitlines()]
    said = [likeliest(model, query, 6) for query in queries]
    answers = [one if i < RIGHT else f"{one}?" for i, one in enumerate(said)]
    records = [{"query": query, "answer": answer} for query, answer in zip(queries, answers, strict=True)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, examples and task files."""
    folder = tmp_path_factory.mktemp("lm_eval")
    train_small(folder)
    questions(folder / "choice.jsonl", 8)
    draw = random.Random(5)
    texts = [sentence(draw, 4 + 20 * i) for i in range(4)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_asked(folder)
    for name, text in TASKS.items():
        file = folder / f"{FILES[name]}.jsonl"
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + text.lstrip())
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """What lm-eval reports."""
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    threads = torch.get_num_threads()
    found = lm_eval.simple_evaluate(
        model="fp8train",
        model_args=f"path={folder / 'run'},numerics=bf16,device=cpu",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=3,
        bootstrap_iters=2,
    )
    torch.set_num_threads(threads)
    assert found is not None
    return found


def test_multiple_choice_is_that_of_our_own_tasks(folder: Path, results: dict[str, Any]) -> None:
    model = Fp8TrainLM(str(folder / "run"), "bf16", device="cpu")
    task = read_task(folder / "choice.jsonl")
    encoded = encode_task(task, model.tokenizer, delimiter=" ", context_length=model.max_length)
    scores = score(model.model, encoded.requests, batch_size=3, pad_id=model.tokenizer.eod_id, ranks=alone())
    ours, theirs = task_metrics(task, scores), results["results"]["local_choice"]
    assert theirs["acc,none"] == ours["acc"]
    # lm-eval's acc_norm divides by characters, its acc_bytes by bytes; in ASCII these are the same.
    assert theirs["acc_bytes,none"] == ours["acc_norm"] == theirs["acc_norm,none"]
    assert theirs["acc_stderr,none"] == pytest.approx(ours["acc_stderr"])
    logged = [pair for sample in results["samples"]["local_choice"] for [pair] in sample["resps"]]
    assert len(logged) == len(scores)


def test_rolling_is_our_text_perplexity(folder: Path, results: dict[str, Any]) -> None:
    model = Fp8TrainLM(str(folder / "run"), "bf16", device="cpu")
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    nats = -sum(model.loglikelihood_rolling(requests, disable_tqdm=True))
    num_bytes = sum(len(text.encode()) for text in texts)
    found = results["results"]["local_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert any(len(model.tokenizer.encode(text)) > model.max_length for text in texts)


def test_generation_stops_where_it_is_told(folder: Path, results: dict[str, Any]) -> None:
    asked = len((folder / "asked.jsonl").read_text().splitlines())
    assert results["results"]["local_generation"]["exact_match,none"] == RIGHT / asked == 3 / 8
    model = Fp8TrainLM(str(folder / "run"), "bf16", device="cpu")

    def ask(context: str, **settings: Any) -> str:
        return model.generate_until([Instance("generate_until", {}, (context, settings), 0)])[0]

    whole = ask("how to cut", max_gen_toks=12)
    assert len(whole) > 3 and whole == ask("how to cut", max_gen_toks=12, do_sample=False)
    stop = whole[2]
    assert ask("how to cut", max_gen_toks=12, until=[stop]) == whole.split(stop)[0]
    assert ask("how to cut " * 30, max_gen_toks=3), "a prompt longer than the context loses its beginning"
    with pytest.raises(InferenceError, match="not known here: num_beams"):
        ask("how", num_beams=4)


def test_refusals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(folder / "run")
    with pytest.raises(InferenceError, match="numerics=fp4: choose matched or bf16"):
        Fp8TrainLM(run, "fp4")  # type: ignore[arg-type]
    with pytest.raises(InferenceError, match="max_length=99: the model's context is 32 tokens"):
        Fp8TrainLM(run, max_length=99)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(InferenceError, match="one process"):
        Fp8TrainLM(run)


@pytest.mark.slow
def test_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "fp8train.evaluation.lm_eval_adapter", "--model", "fp8train"]
    command += ["--model_args", f"path={folder / 'run'}", "--device", "cpu", "--tasks", "local_choice"]
    command += ["--include_path", str(folder)]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    assert "|local_choice|" in done.stdout and "acc_norm" in done.stdout
