"""Scores of texts and tasks, against transformers and lm-eval; several ranks against one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8train.cli import run_command
from fp8train.comm.collectives import alone
from fp8train.config.errors import UserError
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.tokenizer import Tokenizer
from fp8train.evaluation.scoring import Request, encode_pair, score
from fp8train.evaluation.tasks import encode_task, read_task, task_metrics
from fp8train.evaluation.text import corpus_requests, read_corpus, windows
from fp8train.inference.errors import InferenceError
from fp8train.models.build import build_model, initialise
from fp8train.models.decoder import Decoder
from tests.inference.trained import sentence, train_small
from tests.models.hf_mapping import to_llama
from tests.models.settings import tiny_config
from tests.models.test_hf_parity import llama_of

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 run with current scales that are no powers of two."""
    return train_small(tmp_path_factory.mktemp("scoring"), "precision.recipe=te_current")


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> Tokenizer:
    """Its tokenizer."""
    return load_tokenizer(run / "tokenizer.model")


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer) -> tuple[Decoder, torch.nn.Module]:
    """A random Llama in FP32, and the same weights in transformers."""
    config = tiny_config({"family": "llama", "num_kv_heads": 2, "init_std": 0.2, "max_seq_len": CONTEXT})
    ours = build_model(config, vocab_size=tokenizer.vocab_size, device=torch.device("cpu")).model
    initialise(ours, 5)
    theirs = llama_of(ours.config)
    missing, unexpected = theirs.load_state_dict(to_llama(ours.state_dict(), ours.config), strict=False)
    assert (missing, unexpected) == ([], [])
    return ours, theirs.eval()


def questions(path: Path, count: int) -> list[dict[str, Any]]:
    """A file in the form of PIQA; half of the queries end in a line break."""
    draw = random.Random(1)
    records = [
        {
            "query": f"Question: {sentence(draw, 5)}?" + ("\n" if i % 2 else ""),
            "choices": [sentence(draw, draw.randrange(1, 6)) for _ in range(2 + i % 3)],
            "gold": draw.randrange(2),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@torch.no_grad()
def log_probs_of(theirs: torch.nn.Module, context: list[int], target: list[int]) -> tuple[float, bool]:
    """One unpadded sequence through transformers."""
    ids = torch.tensor([[*context, *target]])
    logits = theirs(input_ids=ids[:, :-1]).logits[0, -len(target) :].double()
    picked = logits.log_softmax(-1)[torch.arange(len(target)), target]
    return float(picked.sum()), logits.argmax(-1).tolist() == target


def test_multiple_choice_against_transformers(
    models: tuple[Decoder, torch.nn.Module], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours, theirs = models
    short = 14  # some queries lose their beginning
    records = questions(tmp_path / "piqa.jsonl", 12)
    task = read_task(tmp_path / "piqa.jsonl")
    encoded = encode_task(task, tokenizer, delimiter=" ", context_length=short)
    scores = score(ours, encoded.requests, batch_size=5, pad_id=tokenizer.eod_id, ranks=alone())
    rest, right, right_norm, gold = iter(scores), [], [], []
    for record in records:
        query, expected = record["query"], []
        for choice in record["choices"]:
            whole = tokenizer.encode(query + ("" if query.endswith("\n") else " ") + choice)
            cut = len(tokenizer.encode(query.rstrip()))
            context, target = whole[:cut][-(short + 1 - len(whole[cut:])) :], whole[cut:]
            expected.append(log_probs_of(theirs, context, target)[0])
            assert next(rest).log_prob == pytest.approx(expected[-1], abs=1e-4)
        right.append(max(range(len(expected)), key=expected.__getitem__) == record["gold"])
        gold.append(expected[record["gold"]])
        norm = [e / len(c.encode()) for e, c in zip(expected, record["choices"], strict=True)]
        right_norm.append(norm.index(max(norm)) == record["gold"])
    assert encoded.truncated > 0, "no context was shortened, so that was not compared"
    metrics = task_metrics(task, scores)
    accuracy = sum(right) / 12
    assert metrics["acc"] == accuracy and metrics["acc_norm"] == sum(right_norm) / 12
    assert 0 < accuracy < 1
    assert metrics["gold_log_prob"] == pytest.approx(sum(gold) / 12, rel=1e-5)
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 11))


def test_last_words_against_transformers(
    models: tuple[Decoder, torch.nn.Module], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours, theirs = models
    draw = random.Random(2)
    texts = [sentence(draw, 6) for _ in range(6)]
    # What the model would say itself, so that some greedy matches are true.
    for text in texts[:2]:
        ids = tokenizer.encode(text)
        best = theirs(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
        texts.append(f"{text} {tokenizer.decode([int(best)]).strip() or 'x'}")
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = read_task(path)
    requests = encode_task(task, tokenizer, delimiter=" ", context_length=CONTEXT).requests
    scores = score(ours, requests, batch_size=3, pad_id=tokenizer.eod_id, ranks=alone())
    expected = []
    for text in texts:
        before = len(tokenizer.encode(text.rpartition(" ")[0]))
        whole = tokenizer.encode(text)
        expected.append(log_probs_of(theirs, whole[:before], whole[before:]))
    assert [one.greedy for one in scores] == [greedy for _, greedy in expected]
    metrics = task_metrics(task, scores)
    assert metrics["acc"] == sum(greedy for _, greedy in expected) / len(texts)
    mean = sum(log_prob for log_prob, _ in expected) / len(texts)
    assert metrics["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    other = tmp_path / "pairs.jsonl"
    records = [dict(zip(("context", "_", "target"), text.rpartition(" "), strict=True)) for text in texts]
    other.write_text("\n\n".join(json.dumps(record) for record in records))
    pairs = encode_task(read_task(other), tokenizer, delimiter=" ", context_length=CONTEXT).requests
    assert pairs == requests


def test_greedy_is_the_likeliest_token(models: tuple[Decoder, torch.nn.Module], tokenizer: Tokenizer) -> None:
    ours, theirs = models
    context = [5, 7, 11]
    best = int(theirs(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    requests = [Request(context, [best]), Request(context, [(best + 1) % 360]), Request([5], [7, best])]
    scores = score(ours, requests, batch_size=3, pad_id=tokenizer.eod_id, ranks=alone())
    assert [one.greedy for one in scores] == [True, False, log_probs_of(theirs, [5], [7, best])[1]]


def test_text_against_transformers(
    models: tuple[Decoder, torch.nn.Module], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Sums of negative log-probabilities over explicit windows, documents apart and as one stream."""
    ours, theirs = models
    texts = ["Fold it.\r\n", "how to cut paper — with sharp scissors\n" * 5]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    corpus = read_corpus([path], tokenizer, json_key="body")
    assert corpus.num_bytes == sum(len(text.encode()) for text in texts)
    stride, eod = 10, tokenizer.eod_id
    for one_stream in (False, True):
        requests = corpus_requests(
            corpus, eod_id=eod, context_length=CONTEXT, stride=stride, one_stream=one_stream
        )
        found = score(ours, requests, batch_size=4, pad_id=eod, ranks=alone())
        documents = [tokenizer.encode(text) for text in texts]
        if one_stream:
            documents = [[*documents[0], eod, *documents[1], eod]]
        expected = 0.0
        for document in documents:
            sequence, done = [eod, *document], 0
            while done < len(document):
                end = min(len(document), CONTEXT if done == 0 else done + stride)
                part = sequence[max(0, end - CONTEXT) : end + 1]
                new = end - done
                expected += log_probs_of(theirs, part[:-new], part[-new:])[0]
                done = end
        assert sum(one.log_prob for one in found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(3, 8, 8), (8, 8, 8), (9, 8, 8), (31, 8, 3), (20, 8, 1)]
)
def test_windows_are_those_of_lm_eval(length: int, context: int, stride: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="compares with lm-eval: pip install 'fp8train[eval]'")
    tokens = list(range(100, 100 + length))
    theirs = utils.get_rolling_token_windows(tokens, 7, context, context - stride + 1)
    ours = list(windows(tokens, before=7, context_length=context, stride=stride))
    expected = [utils.make_disjoint_window(pair) for pair in theirs]
    assert [(list(one.context), list(one.target)) for one in ours] == expected
    assert [token for one in ours for token in one.target] == tokens


def test_where_a_pair_is_cut(tokenizer: Tokenizer) -> None:
    eod = tokenizer.eod_id
    for context, continuation in (("fold it ", "twice"), ("fold it", " twice"), ("fold it \n", "twice")):
        pair = encode_pair(tokenizer, context, continuation)
        assert [*pair.context, *pair.target] == tokenizer.encode(context + continuation)
        assert pair.context == tokenizer.encode("fold it")
    for blank in ("", " \n"):
        pair = encode_pair(tokenizer, blank, "twice")
        assert (pair.context, pair.target) == ([eod], tokenizer.encode(blank + "twice"))
    whole = tokenizer.encode("scissors")
    assert len(whole) < len(tokenizer.encode("scisso")), "the boundary must lie inside a token"
    merged = encode_pair(tokenizer, "scisso", "rs")
    assert ([*merged.context], [*merged.target]) == (whole[:-1] or [eod], whole[-1:])
    apart = encode_pair(tokenizer, "fold it \n", "twice", apart=True)
    assert (apart.context, apart.target) == (tokenizer.encode("fold it \n"), tokenizer.encode("twice"))
    with pytest.raises(InferenceError, match="no tokens to score"):
        encode_pair(tokenizer, "", "")


def evaluated(run: Path, *options: str) -> dict[str, Any]:
    """The JSON of the command line, without what the clock says."""
    report = run / "report.json"
    report.unlink(missing_ok=True)
    assert run_command(["eval", str(run), "--device", "cpu", "--json", str(report), *options]) == 0
    found = json.loads(report.read_text())
    for result in found["results"]:
        del result["seconds"]
    return found


def options_of(folder: Path) -> list[list[str]]:
    """One of each kind of evaluation."""
    return [
        ["--tasks", str(folder / "q.jsonl"), "--batch-size", "4"],
        ["--text", str(folder / "t.txt"), "--stride", "20", "--batch-size", "2"],
        ["--batches", "5"],
    ]


def evaluate_in_pool(group: None, rank: int, world_size: int, run: Path, options: list[str]) -> int:
    """Runs in the pool."""
    report = run / "pool.json"
    return run_command(["eval", str(run), "--device", "cpu", "--json", str(report), *options])


def test_two_ranks_give_the_bits_of_one(gloo_pool, run: Path, tmp_path: Path) -> None:
    """With current FP8 scales, whose bits depend on what is batched together."""
    questions(tmp_path / "q.jsonl", 9)
    draw = random.Random(4)
    (tmp_path / "t.txt").write_text("\n".join(sentence(draw) for _ in range(30)))
    together = []
    for options in options_of(tmp_path):
        assert gloo_pool.run(evaluate_in_pool, 2, run, options, join=False, timeout=120.0) == [0, 0]
        together.append(json.loads((run / "pool.json").read_text()))
        for result in together[-1]["results"]:
            del result["seconds"]
        single = evaluated(run, *options)
        assert together[-1] == single
        assert single["results"][0]["operands"].startswith("FP8") and len(single["results"]) == 2
    smaller = evaluated(run, *options_of(tmp_path)[1][:-1], "1")
    first, other = smaller["results"][0]["loss"], together[1]["results"][0]["loss"]
    assert first != other and first == pytest.approx(other, rel=1e-2)


def test_what_the_command_prints(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions(tmp_path / "piqa.jsonl", 9)
    report = evaluated(run, "--tasks", str(tmp_path / "piqa.jsonl"), "--limit", "4", "--numerics", "bf16")
    out, err = capsys.readouterr()
    [row] = report["results"][0]["tasks"]
    assert row["examples"] == 4 and row["kind"] == "multiple_choice"
    assert out.startswith(f"bf16    | piqa | acc {row['acc']:.4f} ± {row['acc_stderr']:.4f} | acc_norm ")
    assert "piqa.jsonl 4 examples; context 32 tokens" in err
    (tmp_path / "t.txt").write_text("Fold it — twice.\n")
    report = evaluated(run, "--text", str(tmp_path / "t.txt"), "--numerics", "bf16")
    [result] = report["results"]
    assert report["bytes"] == 19 and report["windows"] == 1
    nats = result["loss"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 19)
    assert f"1 documents, {result['tokens']} tokens, 19 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"query": "a", "choices": ["b", "c"]}', "'query' needs 'gold' beside it"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "not a list of two or more"),
        (
            '{"query": "a", "choices": ["b", ""], "gold": 0}',
            "a choice is not a string with something to score",
        ),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2; it must be a number from 0 to 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "gold is True"),
        ('{"query": 1, "choices": ["b", "c"], "gold": 0}', "query is not a string"),
        ('{"text": "word"}', "text has only one word"),
        ('{"text": "two words"}', "another form than the first line"),
        ('{"context": "a", "target": " "}', "target is not a string with something to predict"),
        ('{"question": "a"}', "neither query, choices and gold"),
        ("\udcff", "not UTF-8 at byte 0"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "q.jsonl"
    first = json.dumps({"query": "a", "choices": ["b", "c"], "gold": 1})
    path.write_bytes(f"{first}\n\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


def test_refusals(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, long = tmp_path / "t.txt", tmp_path / "long.jsonl"
    text.write_text("a")
    long.write_text(json.dumps({"context": "a", "target": "glue " * 40}))
    for options, message in (
        (["--text", str(text), "--tasks", str(text)], "--text and --tasks are evaluated one at a time"),
        (["--text", str(text), "--limit", "1"], "--limit is an option of --tasks"),
        (["--text", str(text), "--apart"], "--apart is an option of --tasks"),
        (["--tasks", str(text), "--stream"], "--stream is an option of --text"),
        (["--text", str(text), "--split", "valid"], "--split is an option of a dataset"),
        (["--context", "8"], "--context is for --text and --tasks"),
        (["--text", str(text), "--context", "99"], "--context 99 is more than the model's context"),
        (["--text", str(text), "--stride", "33"], "--stride 33 is more than the context of 32 tokens"),
        (["--text", str(tmp_path / "none")], "none: no such file; give a file of text"),
        (["--tasks", str(long)], "long.jsonl:1: "),
    ):
        assert run_command(["eval", str(run), *options]) == 2
        assert message in capsys.readouterr().err
