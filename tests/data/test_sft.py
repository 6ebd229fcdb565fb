"""Conversations: tokens, targets, packing, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8train.cli import run_command
from fp8train.config.data_schema import DataConfig
from fp8train.config.errors import ConfigError
from fp8train.config.resolve import resolve_mapping
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.loading import Data, open_data
from fp8train.data.packing import PackedSamples, Piece, pack
from fp8train.data.prepare import prepare
from fp8train.data.prepare_sft import mask_path, prepare_sft, read_mask
from fp8train.data.sidecar import read_sidecar
from fp8train.data.tokenizer import Tokenizer

_TEXT = "fold the paper twice and glue its wet edge before it dries under warm light"
WORDS = _TEXT.split()
SEQ = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of a pretraining dataset, ``base`` beside it."""
    folder = tmp_path_factory.mktemp("base")
    draw = random.Random(0)
    (folder / "a.txt").write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(400)))
    prepare([folder / "a.txt"], folder / "base", vocab_size=340, workers=1)
    return load_tokenizer(folder / "base.model")


def records(count: int) -> list[dict[str, Any]]:
    """Both forms in turn, of many lengths."""
    draw = random.Random(1)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randrange(1, most)))

    found: list[dict[str, Any]] = []
    for i in range(count):
        if i % 2:
            found.append({"prompt": f"Q: {text(6)}\nA:", "response": f" {text(8)}"})
            continue
        turns = [{"role": "user", "content": text(5)}, {"role": "assistant", "content": text(6)}]
        more = [{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(4)}]
        system = [{"role": "system", "content": "Be brief."}]
        found.append({"messages": [*system[: i // 2 % 2], *turns, *more[: i % 4]]})
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def expected(record: dict[str, Any], tokenizer: Tokenizer) -> list[tuple[int, bool]]:
    """(token, is target) of a record, spelt out."""
    if "prompt" in record:
        parts = [(record["prompt"], record["response"])]
    else:
        parts, read = [], ""
        for message in record["messages"]:
            read += f"<|{message['role']}|>\n"
            if message["role"] == "assistant":
                parts.append((read, message["content"]))
                read = ""
            else:
                read += message["content"] + "\n"
    found = []
    for read, learnt in parts:
        found += [(token, False) for token in tokenizer.encode(read)]
        found += [(token, True) for token in [*tokenizer.encode(learnt), tokenizer.eod_id]]
    return found


def test_tokens_and_targets(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = records(12)
    file = write(tmp_path / "c.jsonl", [*lines, {"prompt": "a", "response": " "}])
    prefix = str(tmp_path / "out" / "c")
    options = ["--output", prefix, "--tokenizer", str(tokenizer.path), "--no-shuffle"]
    assert run_command(["data", "prepare-sft", str(file), *options]) == 0
    dataset = IndexedDataset(prefix)
    sidecar = read_sidecar(dataset)
    mask = read_mask(dataset, sidecar)
    assert dataset.num_documents == 12
    for number, line in enumerate(lines):
        first, stop = dataset.document_offsets[number : number + 2]
        found = list(zip(dataset.document(number).tolist(), (mask[first:stop] == 1).tolist(), strict=True))
        assert found == expected(line, tokenizer)
    assert sidecar is not None and sidecar.mask is not None
    assert 0 < sidecar.mask.targets == mask.sum() < dataset.num_tokens
    assert sidecar.exact_bytes and sidecar.report == {"skipped: an answer is empty": 1}
    assert f"12 conversations, {dataset.num_tokens} tokens, {mask.sum()} targets" in capsys.readouterr().out
    assert run_command(["data", "inspect", prefix]) == 0
    assert f"for fine-tuning: {mask.sum()} tokens are targets" in capsys.readouterr().out


def test_the_order_is_the_seeds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", records(20))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_sft([file], tmp_path / name, tokenizer=tokenizer.path, seed=seed)
    files = {name: [(tmp_path / f"{name}.{end}").read_bytes() for end in ("bin", "mask")] for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


def test_best_fit() -> None:
    pieces, start = [], 0
    for length, continues in (
        (6, False),
        (7, False),
        (4, False),
        (3, False),
        (2, True),
        (8, False),
        (1, False),
    ):
        pieces.append(Piece(start, start + length, continues))
        start += length
    packed = [[len(piece) for piece in one] for one in pack(pieces, 10)]
    assert packed == [[6, 4], [7, 3], [2, 8], [1]]
    draw = random.Random(2)
    many = [Piece(0, draw.randrange(1, 33), False) for _ in range(2000)]
    filled = pack(many, 32)
    assert all(sum(map(len, one)) <= 32 for one in filled)
    assert sorted(len(piece) for one in filled for piece in one) == sorted(map(len, many))
    assert len(filled) <= 1.04 * sum(map(len, many)) / 32


def opened(prefix: str | Path, **settings: Any) -> Data:
    data = DataConfig(
        prefix=str(prefix), seq_length=SEQ, **{"kind": "sft", "split": (0.8, 0.2, 0.0), **settings}
    )
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
    return open_data(data, vocab_size=None, **sizes, seed=7, total_steps=4)


@pytest.fixture(scope="module")
def conversations(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in which a few conversations are longer than a sequence, one with a prompt of three."""
    folder = tmp_path_factory.mktemp("conversations")
    long = [
        {"prompt": "fold the paper " * 30, "response": "twice"},
        {"prompt": "glue", "response": " the wet edge before it dries" * 12},
    ]
    file = write(folder / "c.jsonl", [*records(40), *long])
    prepare_sft([file], folder / "c", tokenizer=tokenizer.path, shuffle=False)
    return folder / "c"


@pytest.mark.parametrize("packing", [None, "none"])
def test_samples_hold_every_target_once(
    conversations: Path, tokenizer: Tokenizer, packing: str | None
) -> None:
    data = opened(conversations, split=(1.0, 0.0, 0.0), packing=packing)
    samples = data.train.samples
    assert isinstance(samples, PackedSamples)
    dataset = IndexedDataset(conversations)
    long = int((np.diff(dataset.document_offsets) > SEQ).sum())
    assert samples.num_cut == long >= 2 and samples.num_dropped >= 2
    mask = read_mask(dataset, read_sidecar(dataset))
    text = dataset.tokens(0, dataset.num_tokens)
    seen = np.zeros(dataset.num_tokens, dtype=int)
    starts = set(dataset.document_offsets.tolist())
    for index in range(samples.samples_per_epoch):
        sample = samples[index]
        assert sample.shape == (SEQ + 1,) and sample[0] < 0
        ids = np.where(sample < 0, ~sample, sample)
        for position in np.flatnonzero(sample >= 0).tolist():
            place = samples.place(index, position)
            token = int(dataset.document_offsets[place.document]) + place.offset
            seen[token] += 1
            before = tokenizer.eod_id if token in starts else text[token - 1]
            assert (ids[position], ids[position - 1]) == (text[token], before)
        if packing == "none":
            assert len({samples.place(index, p).document for p in np.flatnonzero(sample >= 0).tolist()}) == 1
    assert (seen == mask).all()
    again = [samples[samples.samples_per_epoch + i].tobytes() for i in range(samples.samples_per_epoch)]
    first = [samples[i].tobytes() for i in range(samples.samples_per_epoch)]
    assert first != again and sorted(first) == sorted(again)  # another order of the same sequences
    assert f"{long} longer than a sequence were cut" in samples.description


def test_packing_fills_sequences(conversations: Path) -> None:
    packed, apart = opened(conversations), opened(conversations, packing="none")
    assert packed.train.samples.samples_per_epoch < 0.7 * apart.train.samples.samples_per_epoch
    prints = {one.train.samples.fingerprint for one in (packed, apart, opened(conversations, shuffle_seed=1))}
    assert len(prints) == 3
    assert packed.valid is not None and "(valid: 8 conversations" in packed.valid.samples.description


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "neither prompt and response nor messages"),
        ({"prompt": 1, "response": "a"}, "prompt is not a string"),
        ({"messages": []}, "messages is not a list with something in it"),
        ({"messages": [{"role": "user"}]}, "message 0 is not {role, content}"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 0 has the role 'bot'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "only the first",
        ),
    ],
)
def test_malformed_lines_are_named(
    tokenizer: Tokenizer, tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "c.jsonl", [{"prompt": "a", "response": "b"}, line])
    with pytest.raises(DataError) as caught:
        prepare_sft([file], tmp_path / "out", tokenizer=tokenizer.path)
    assert str(caught.value).startswith(f"{file}:2: ") and message in str(caught.value)
    assert not (tmp_path / "out.idx").exists()


def test_kinds_do_not_mix(conversations: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"write `kind`: sft"):
        opened(conversations, kind="pretrain")
    with pytest.raises(DataError, match="does not say which tokens are targets"):
        opened(tokenizer.path.with_name("base"))
    for name in ("c.bin", "c.idx", "c.json", "c.model", "c.mask"):
        (tmp_path / name).write_bytes(conversations.with_name(name).read_bytes())
    mask = bytearray(mask_path(tmp_path / "c").read_bytes())
    mask[5] ^= 1
    mask_path(tmp_path / "c").write_bytes(mask)
    with pytest.raises(DataError, match=r"c\.mask: not the file that c\.json describes"):
        opened(tmp_path / "c")
    mapping = {
        "model": {"family": "llama", "num_layers": 1, "hidden_size": 32, "num_heads": 2},
        "optimizer": {"lr": 0.1},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    for settings, message in (
        ({"packing": "none"}, "data.packing, data.kind: has no effect: data.kind is pretrain"),
        ({"kind": "sft", "mask_end_of_document": True}, "data.kind: has no effect: data.kind is sft"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_mapping({**mapping, "data": {"prefix": "x", "seq_length": 8, **settings}})
