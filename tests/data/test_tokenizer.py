"""Tokenizers: every text comes back byte for byte, byte counts are exact, training is a function of text."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8train.data.errors import DataError
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.sentencepiece_tokenizer import SentencePieceTokenizer
from fp8train.data.tokenizer import Tokenizer
from fp8train.data.tokenizer_training import train_sentencepiece

STDLIB = Path(sysconfig.get_path("stdlib"))
TRAINING = [STDLIB / name for name in ("argparse.py", "dataclasses.py", "ast.py", "textwrap.py")]
WEIRD = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "no newline at the end",
    "\tif x:\r\n\t\treturn  # \x0c form feed\r\n",
    "  leading and trailing  ",
    "\u2581 literal \u2581\u2581\n\u2581",
    "<eod><unk><pad><0x0A></s>",
    "NUL \0 and DEL \x7f",
    "\ufeffBOM, \u200b zero width, \u3000 ideographic, \u2028 line separator",
    "e\u0301 \u00e9 \ufb01 \u2126",  # would change under NFKC
    "\u4e2d\u6587 \U0001f600\U0001f468\u200d\U0001f469",
    "\u2585\u2047\ue000\U0010ffff",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    texts = [path.read_text() for path in TRAINING[: 4 if request.param == "bpe" else 1]]
    path = tmp_path_factory.mktemp(request.param) / "t.model"
    path.write_bytes(train_sentencepiece(texts, vocab_size=600, model_type=request.param))
    return load_tokenizer(path)


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_lengths()[ids].sum()) == len(text.encode())
    assert tokenizer.eod_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("text", WEIRD)
def test_weird_texts(tokenizer, text):
    check_round_trip(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet=" \t\n\r\u2581a<>0x", max_size=40))
def test_any_text(tokenizer, text):
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize(
    "name", ["token.py", "this.py", "textwrap.py", "encodings/cp1250.py", "turtle.py", "tabnanny.py"]
)
def test_standard_library_sources(tokenizer, name):
    check_round_trip(tokenizer, (STDLIB / name).read_bytes().decode())


def test_lines_encode_as_whole_texts_do(tokenizer):
    """The line-by-line path gives what SentencePiece gives for the whole text (unigram: up to ties in its
    float sums).
    """
    text = (STDLIB / "textwrap.py").read_text()
    ours, whole = tokenizer.encode(text), tokenizer._model.encode(text)
    assert len(ours) == len(whole)
    differing = sum(a != b for a, b in zip(ours, whole, strict=True))
    assert differing <= (10 if "unigram" in str(tokenizer.path) else 0)


def test_special_ids(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (600, 1)
    assert tokenizer.decode([tokenizer.eod_id]) == ""
    assert tokenizer.token_bytes[:3] == [b"", b"", b""]


def test_cut_characters_are_replaced(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_indentation_is_few_tokens(tokenizer):
    assert len(tokenizer.encode("        return x\n")) <= 6


def test_training_is_a_function_of_the_text():
    texts = [TRAINING[3].read_text()]
    first = train_sentencepiece(texts, vocab_size=400)
    # however the text is cut between lines
    assert first == train_sentencepiece(texts[0].split("\n"), vocab_size=400)
    assert first != train_sentencepiece([TRAINING[1].read_text()], vocab_size=400)


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(200, "too small"), (50000, "cannot learn 50000 bpe tokens")]
)
def test_impossible_vocabularies(vocab_size, message):
    with pytest.raises(DataError, match=message):
        train_sentencepiece(["a few words only"], vocab_size=vocab_size)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"no\.model: No such file"):
        load_tokenizer(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "empty.model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path / "folder")


def test_damaged_models_are_usable_or_one_error(tokenizer, tmp_path):
    """Flipped and cut: what loads works, whatever its pieces; everything else is a DataError."""
    good, path = tokenizer.path.read_bytes(), tmp_path / "t.model"
    found = {"usable": 0, "refused": 0}
    flipped = [good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :] for at in range(0, len(good), 50)
               for mask in (0xFF, 1 << at % 8)]  # fmt: skip
    for data in [*flipped, *(good[:at] for at in range(0, len(good), 500))]:
        path.write_bytes(data)
        try:
            damaged = load_tokenizer(path)
        except DataError as error:
            assert "not a SentencePiece model" in str(error)  # noqa: PT017 - each case may do either
            found["refused"] += 1
        else:
            damaged.decode(damaged.encode(WEIRD[5]))
            found["usable"] += 1
    assert min(found.values()) > 20


def test_models_that_change_text_are_used_as_they_are(tmp_path):
    """A model with a dummy prefix (Llama-2's way) sees whole documents and claims no byte counts."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING[3].read_text().split("\n")), model_writer=model, vocab_size=500,
        model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    assert tokenizer.token_bytes is None
    assert tokenizer.token_lengths() is None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    text = "def f(x):\n  return x\n"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode("def f")) == "def f"


def test_hugging_face_library_missing(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'fp8train\[hf\]'"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'fp8train[hf]'")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TRAINING[3].read_text()], trainer)
    model.enable_truncation(4)  # must not cut documents
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.mark.parametrize("text", [*WEIRD, "<|endoftext|> is only text here"])
def test_hugging_face_byte_level(byte_level_file, text):
    tokenizer = load_tokenizer(byte_level_file.parent)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (400, 0)
    check_round_trip(tokenizer, text)
    assert b"".join(tokenizer.token_bytes[token] for token in tokenizer.encode(text)) == text.encode()


def test_damaged_tokenizer_json(byte_level_file, tmp_path):
    """Every value replaced by one of another kind, in turn: usable, or a DataError, and no gigabytes."""
    content = json.loads(byte_level_file.read_text())
    content["model"] |= {"vocab": dict(list(content["model"]["vocab"].items())[:260]), "merges": []}
    odd = [None, True, -1, 2**32 - 1, 10**30, "", "\0", [], {}, [None], {"a": None}]
    found = {"usable": 0, "refused": 0}
    for path in list(paths_in(content)):
        for value in odd:
            damaged = json.loads(json.dumps(content))
            target = damaged
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
            (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
            found[use_or_refusal(tmp_path / "tokenizer.json")] += 1
    assert min(found.values()) > 20
    for text in ("[" * 100_000, '{"model":' * 100_000, json.dumps(content)[:-5]):
        (tmp_path / "tokenizer.json").write_text(text)
        assert use_or_refusal(tmp_path / "tokenizer.json") == "refused"
    content["model"]["vocab"]["x"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has the id 4294967295, and no vocabulary is so large"):
        load_tokenizer(tmp_path)


def paths_in(value, path=()):
    """Where something lies in it: of long lists and mappings the first two only."""
    if isinstance(value, dict | list):
        keys = list(value if isinstance(value, dict) else range(len(value)))
        for key in keys if len(keys) < 20 else keys[:2]:
            yield (*path, key)
            yield from paths_in(value[key], (*path, key))


def use_or_refusal(path):
    try:
        tokenizer = load_tokenizer(path)
    except DataError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - each case may do either
        return "refused"
    tokenizer.decode(tokenizer.encode(WEIRD[5]))
    return "usable"


def test_hugging_face_end_of_document(byte_level_file, tmp_path):
    assert (
        load_tokenizer(byte_level_file, eod_token="a").eod_id
        == load_tokenizer(byte_level_file).encode("a")[0]
    )
    with pytest.raises(DataError, match=r"no end-of-document token \(looked for <none>"):
        load_tokenizer(byte_level_file, eod_token="<none>")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
