"""Preparing datasets: content, order, counts of what was skipped or repaired (fault row 18), and refusals."""

import errno
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from fp8train.data import prepare as prepare_module
from fp8train.data import sources
from fp8train.data.byte_progress import ByteProgress
from fp8train.data.cleaning import Report, clean, clean_json_line
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset
from fp8train.data.prepare import prepare
from fp8train.data.sidecar import read_sidecar, sidecar_tokenizer
from fp8train.data.sources import find_files, plan_units, stdlib_corpus

VOCAB = 300
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "seven", "other", "animals"]


def texts_of(prefix: Path) -> list[str]:
    data = IndexedDataset(prefix)
    sidecar = read_sidecar(data)
    tokenizer = sidecar_tokenizer(prefix, sidecar)
    texts = []
    for number in range(data.num_documents):
        ids = data.document(number).tolist()
        assert ids[-1] == tokenizer.eod_id
        assert tokenizer.eod_id not in ids[:-1]
        texts.append(tokenizer.decode(ids))
    return texts


def filler(seed: int, words: int = 400) -> str:
    rng = random.Random(seed)
    lines = [[rng.choice(WORDS) for _ in range(8)] for _ in range(words // 8)]
    return "\n".join(map(" ".join, lines)) + "\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.txt").write_text(filler(number))
    (folder / "sub" / "a.txt").write_text(filler(10))
    (folder / "sub" / "b.md").write_text("not matched")
    records = [{"text": filler(20 + number, 40), "id": number} for number in range(30)]
    (folder / "z.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def expected_texts() -> list[str]:
    return [filler(n) for n in range(6)] + [filler(10)] + [filler(20 + n, 40) for n in range(30)]


def test_source_order(corpus, tmp_path):
    sidecar = prepare([corpus], tmp_path / "out", vocab_size=VOCAB, shuffle=False, workers=1)
    texts = texts_of(tmp_path / "out")
    assert texts == expected_texts()
    assert sidecar.documents == 37
    assert sidecar.source_bytes == sum(len(text.encode()) for text in texts)
    assert sidecar.exact_bytes
    assert sidecar.report == {}
    assert sidecar == read_sidecar(IndexedDataset(tmp_path / "out"))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["in", "out.bin", "out.idx", "out.json", "out.model"]


def test_shuffled_order(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare([corpus], tmp_path / name, vocab_size=VOCAB, seed=seed, workers=1)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert texts_of(tmp_path / "a") != texts_of(tmp_path / "c")
    assert sorted(texts_of(tmp_path / "a")) == sorted(texts_of(tmp_path / "c")) == sorted(expected_texts())
    assert texts_of(tmp_path / "a") != expected_texts()
    assert not list(tmp_path.glob("*unshuffled*"))


def test_number_of_workers_changes_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)  # many units; JSONL lines straddle them
    for name, workers in (("one", 1), ("three", 3)):
        prepare([corpus], tmp_path / name, vocab_size=VOCAB, shuffle=False, workers=workers)
    for suffix in ("bin", "idx", "model"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"three.{suffix}").read_bytes()
    assert texts_of(tmp_path / "three") == expected_texts()


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 10**6])
def test_jsonl_lines_belong_to_exactly_one_unit(tmp_path, monkeypatch, unit_bytes):
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    lines = [json.dumps({"text": f"{n} " + "x" * (n * 7 % 50)}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))  # no newline at the end
    read = [
        text
        for unit in plan_units([tmp_path / "a.jsonl"])
        for text in sources.read_unit(unit, Report(), text_key="text", max_line_bytes=1000)
    ]
    assert read == [json.loads(line)["text"] for line in lines]


CLEANING = {
    "plain": (b"a\n\tb  \x0c\n", "a\n\tb  \x0c\n", []),
    "empty": (b"", None, ["skipped: empty"]),
    "white space": (b" \r\n\t\n", None, ["skipped: empty"]),
    "only NUL": (b"\0\0", None, ["skipped: empty"]),
    "latin-1": (b"se\xf1or", None, ["skipped: not UTF-8"]),
    "UTF-16": ("text".encode("utf-16"), None, ["skipped: not UTF-8"]),
    "surrogate": (b"\xed\xa0\x80", None, ["skipped: not UTF-8"]),
    "BOM": (b"\xef\xbb\xbfa", "a", ["repaired: byte-order mark"]),
    "BOM letters only": (b"\xef\xbb\xbb", "\ufefb", []),
    "NUL": (b"a\0b\0", "ab", ["repaired: NUL bytes"]),
    "CRLF": (b"a\r\nb\rc\r\n", "a\nb\rc\n", ["repaired: CRLF line ends"]),
    "long line": (b"a\n" + b"x" * 101, None, ["skipped: line too long"]),
    "line at the limit": (b"a\n" + b"x" * 100, "a\n" + "x" * 100, []),
    "all repairs": (
        b"\xef\xbb\xbfa\0\r\n",
        "a\n",
        ["repaired: NUL bytes", "repaired: CRLF line ends", "repaired: byte-order mark"],
    ),
}


@pytest.mark.parametrize("name", CLEANING)
def test_cleaning(name):
    data, expected, reasons = CLEANING[name]
    report = Report()
    assert clean(data, "f", report, max_line_bytes=100) == expected
    assert report.counts == dict.fromkeys(reasons, 1)


JSON_LINES = {
    "good": (b'{"text": "a\\nb"}\n', "a\nb", []),
    "blank": (b" \n", None, ["skipped: empty"]),
    "empty text": (b'{"text": ""}', None, ["skipped: empty"]),
    "cut": (b'{"text": "a', None, ["skipped: not JSON"]),
    "deep": (b"[" * 100_000, None, ["skipped: not JSON"]),
    "other key": (b'{"content": "a"}', None, ["skipped: no text under the key"]),
    "number": (b'{"text": 5}', None, ["skipped: no text under the key"]),
    "list": (b'["text"]', None, ["skipped: no text under the key"]),
    "latin-1": (b'{"text": "\xe9"}', None, ["skipped: not UTF-8"]),
    "escaped surrogate": (b'{"text": "\\ud800"}', None, ["skipped: not UTF-8"]),
    "escaped pair": (b'{"text": "\\ud83d\\ude00"}', "\U0001f600", []),
    "escaped NUL": (b'{"text": "a\\u0000"}', "a", ["repaired: NUL bytes"]),
    "CRLF inside": (b'{"text": "a\\r\\nb"}\r\n', "a\nb", ["repaired: CRLF line ends"]),
    "BOM": (b'\xef\xbb\xbf{"text": "a"}', "a", ["repaired: byte-order mark"]),
}


@pytest.mark.parametrize("name", JSON_LINES)
def test_json_lines(name):
    data, expected, reasons = JSON_LINES[name]
    report = Report()
    assert clean_json_line(data, "f", report, text_key="text", max_line_bytes=100) == expected
    assert report.counts == dict.fromkeys(reasons, 1)


def test_bad_documents_are_counted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / f"good{number}.txt").write_text(filler(number))
    for name, key in (
        ("empty", "empty"),
        ("latin", "latin-1"),
        ("nul", "NUL"),
        ("bom", "BOM"),
        ("crlf", "CRLF"),
    ):
        (folder / f"{name}.txt").write_bytes(CLEANING[key][0])
    (folder / "long.txt").write_text("x" * 5000)
    (folder / "bad.jsonl").write_bytes(
        b"".join(line.rstrip(b"\n") + b"\n" for line, _, _ in JSON_LINES.values())
    )
    options = {"vocab_size": VOCAB, "max_line_bytes": 1000, "shuffle": False}
    one = prepare([folder], tmp_path / "one" / "d", workers=1, **options)
    two = prepare([folder], tmp_path / "two" / "d", workers=2, **options)
    assert one == two
    assert one.report == {
        "skipped: empty": 3,
        "skipped: not JSON": 2,
        "skipped: no text under the key": 3,
        "skipped: not UTF-8": 3,
        "skipped: line too long": 1,
        "repaired: NUL bytes": 2,
        "repaired: byte-order mark": 2,
        "repaired: CRLF line ends": 2,
    }
    assert one.documents == 4 + 3 + 5
    assert "x" * 5000 not in texts_of(tmp_path / "one" / "d")


def test_nothing_left(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xff\n")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_text(filler(1))
    prepare([tmp_path / "good.txt"], tmp_path / "good", vocab_size=VOCAB, workers=1)
    with pytest.raises(DataError) as error:
        prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", tokenizer=tmp_path / "good.model")
    assert str(error.value).startswith("no document is left to write:\nskipped: empty: 1 (e.g. ")
    assert f"skipped: not UTF-8: 1 (e.g. {tmp_path / 'a.txt'})" in str(error.value)
    assert not (tmp_path / "out.idx").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_given_tokenizer(corpus, tmp_path):
    prepare([corpus], tmp_path / "a", vocab_size=VOCAB, workers=1)
    sidecar = prepare([corpus / "0.txt"], tmp_path / "b", tokenizer=tmp_path / "a.model", workers=1)
    assert (tmp_path / "b.model").read_bytes() == (tmp_path / "a.model").read_bytes()
    assert (sidecar.vocab_size, sidecar.tokenizer_file) == (VOCAB, "b.model")
    assert texts_of(tmp_path / "b") == [filler(0)]
    with pytest.raises(DataError, match="vocab_size and model_type are for training"):
        prepare([corpus], tmp_path / "c", tokenizer=tmp_path / "a.model", vocab_size=VOCAB)


def test_hugging_face_tokenizer(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'fp8train[hf]'")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["[END]"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([filler(0)], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    options = {"tokenizer": tmp_path / "tokenizer.json", "shuffle": False, "workers": 2}
    with pytest.raises(DataError, match="no end-of-document token"):
        prepare([corpus], tmp_path / "out", **options)
    sidecar = prepare([corpus], tmp_path / "out", eod_token="[END]", overwrite=True, **options)
    assert sidecar.exact_bytes
    assert (sidecar.tokenizer_file, sidecar.eod_token) == ("out.tokenizer.json", "[END]")
    assert texts_of(tmp_path / "out") == expected_texts()


def test_sampled_training_text(corpus, tmp_path):
    """A limit below the corpus size trains on a part of it, drawn by the seed."""
    hashes = [
        prepare(
            [corpus], tmp_path / name, vocab_size=VOCAB, tokenizer_train_bytes=limit, seed=seed, workers=1
        ).tokenizer_sha256
        for name, limit, seed in (
            ("a", 5000, 1),
            ("b", 5000, 1),
            ("c", 5000, 2),
            ("d", 10**9, 1),
            ("e", 10**9, 2),
        )
    ]
    assert hashes[0] == hashes[1]
    assert len({hashes[0], hashes[2], hashes[3]}) == 3
    assert hashes[3] == hashes[4]  # all of the text, whatever the seed


def test_existing_dataset(corpus, tmp_path):
    prepare([corpus], tmp_path / "out", vocab_size=VOCAB, workers=1)
    before = (tmp_path / "out.bin").read_bytes()
    with pytest.raises(DataError, match=r"out exists .*out\.bin.*\nchoose another prefix, or .*--overwrite"):
        prepare([corpus], tmp_path / "out", vocab_size=VOCAB, workers=1)
    assert (tmp_path / "out.bin").read_bytes() == before
    prepare([corpus / "1.txt"], tmp_path / "out", vocab_size=VOCAB, workers=1, overwrite=True)
    assert texts_of(tmp_path / "out") == [filler(1)]


def test_an_interrupted_overwrite_cannot_be_opened(corpus, tmp_path, monkeypatch):
    prepare([corpus], tmp_path / "out", vocab_size=VOCAB, workers=1)

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_shuffle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "out", vocab_size=VOCAB, workers=1, overwrite=True)
    with pytest.raises(DataError, match=r"missing: out\.idx"):
        IndexedDataset(tmp_path / "out")
    assert not list(tmp_path.glob("*unshuffled*")) + list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["nowhere"], {}, "nowhere: no such file or folder"),
        ([], {}, "no input"),
        (["in"], {"patterns": ["*.rst"]}, r"no file in this folder matches \*\.rst"),
        (["in"], {"workers": 0}, "workers must be at least 1"),
        (["in"], {"max_line_bytes": 0}, "must be at least 1"),
        (["in"], {"vocab_size": 100}, "vocab_size 100 is too small"),
        (["in"], {"vocab_size": 10**6}, "cannot learn 1000000 bpe tokens"),
        (["in"], {"tokenizer": "no.model"}, "tokenizer no.model: No such file"),
    ],
)
def test_refusals(corpus, tmp_path, monkeypatch, inputs, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(inputs, "out/d", **options)
    assert not Path("out/d.idx").exists()


def test_folder_cannot_be_created(corpus, tmp_path):
    with pytest.raises(DataError, match=r"0\.txt.*: cannot create the folder"):
        prepare([corpus], corpus / "0.txt" / "x" / "d", vocab_size=VOCAB)


def test_full_disk(corpus, tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module.os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write dataset .*: No space left on device"):
        prepare([corpus], tmp_path / "out", vocab_size=VOCAB, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_unreadable_folders_are_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("x")
    scandir = sources.os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"sub: Permission denied"):
        find_files([tmp_path / "in"])
    with pytest.raises(DataError, match=r"gone\.txt: No such file"):
        plan_units([tmp_path / "gone.txt"])


def test_patterns_and_order(tmp_path):
    for name in ("b/x.py", "a/y.py", "a/y.txt", "c.py", "a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path], ["*.py"])]
    assert names == ["a.py", "a/y.py", "b/x.py", "c.py"]
    assert [p.name for p in find_files([tmp_path / "c.py", tmp_path / "a"], ["*.txt"])] == ["c.py", "y.txt"]
    assert [p.name for p in find_files([tmp_path], ["b/*"])] == ["x.py"]


def test_standard_library_corpus():
    files = stdlib_corpus()
    assert files == stdlib_corpus()
    assert 8e6 < sum(path.stat().st_size for path in files) < 20e6
    parts = {part for path in files for part in path.parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "ensurepip", "__pycache__"}
    assert any(path.name == "argparse.py" for path in files)


def test_progress_in_a_log_file(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 11.0, 12.0, 25.0, 25.0])
    monkeypatch.setattr("fp8train.data.byte_progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with ByteProgress("encoding", 4_000_000, stream) as progress:
        for _ in range(4):
            progress.advance(1_000_000)
    assert stream.getvalue() == "encoding: 50% of 4.0 MB\nencoding: 100% of 4.0 MB\n"


def test_progress_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ByteProgress("encoding", 100, stream) as progress:
        progress.advance(100)
    assert "encoding" in stream.getvalue()
    assert "100" in stream.getvalue()


def test_bytes_of_any_range_of_tokens(corpus, tmp_path):
    """Bits per byte: token lengths over a range equal the UTF-8 bytes of its text."""
    prepare([corpus], tmp_path / "out", vocab_size=VOCAB, workers=1)
    data = IndexedDataset(tmp_path / "out")
    tokenizer = sidecar_tokenizer(tmp_path / "out", read_sidecar(data))
    lengths = tokenizer.token_lengths()
    for begin, end in ((0, data.num_tokens), (17, 430), (100, 101)):
        tokens = data.tokens(begin, end).astype(np.int64)
        assert int(lengths[tokens].sum()) == len(tokenizer.decode(tokens).encode())
