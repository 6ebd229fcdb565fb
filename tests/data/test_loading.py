"""Opening the data of a run: whatever does not fit is found before the first step (rows 10, 12, 15-17)."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8train.config.data_schema import BlendEntry, DataConfig
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fp8train.data.inspection import inspect_dataset
from fp8train.data.load_tokenizer import load_tokenizer
from fp8train.data.loading import Data, open_data, open_split
from fp8train.data.prepare import prepare

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "\t",
    "\u00e9",
]


def write_corpus(path: Path, seed: int, documents: int = 60) -> Path:
    rng = random.Random(seed)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(5, 90))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare([write_corpus(folder / "a.jsonl", 1)], folder / "a", vocab_size=300, workers=1)
    given = {"tokenizer": folder / "a.model", "workers": 1}
    prepare([write_corpus(folder / "b.jsonl", 2)], folder / "b", **given)
    prepare([write_corpus(folder / "other.jsonl", 3)], folder / "other", vocab_size=310, workers=1)
    with IndexedDatasetWriter(folder / "foreign", vocab_size=300) as writer:  # no sidecar
        writer.add_documents(np.arange(4000) % 250, [40] * 100)
        writer.finish()
    return folder


def open_with(config: DataConfig, **options) -> Data:
    defaults = {
        "vocab_size": None,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 1,
        "total_steps": 10,
    }
    return open_data(config, **(defaults | options))


def config(prefix: Path | None, **options) -> DataConfig:
    defaults = {"prefix": None if prefix is None else str(prefix), "seq_length": 16, "split": (0.8, 0.2, 0.0)}
    return DataConfig(**(defaults | options))


def test_a_prepared_dataset(folder):
    data = open_with(config(folder / "a"))
    assert (data.vocab_size, data.eod_id) == (300, 1)
    assert data.tokenizer.sha256 == load_tokenizer(folder / "a.model").sha256
    assert data.train.batch(0).shape == (2, 2, 17)
    assert data.valid.batch(0).shape == (2, 2, 17)
    assert data.test is None
    assert data.epochs == 40 / data.train.samples.samples_per_epoch
    assert len(data.summary()) == 2
    assert "48 documents" in data.summary()[0]


def test_validation_does_not_move_with_the_seed(folder):
    one, two = open_with(config(folder / "a"), seed=1), open_with(config(folder / "a"), seed=2)
    assert torch.equal(one.valid.batch(1), two.valid.batch(1))
    assert not torch.equal(one.train.batch(1), two.train.batch(1))
    fixed = config(folder / "a", shuffle_seed=2)
    assert torch.equal(open_with(fixed, seed=1).train.batch(1), two.train.batch(1))


def test_bits_per_byte(folder):
    """Token lengths over the targets of the validation set equal the bytes of their text."""
    data = open_with(config(folder / "a"), global_batch_size=1, micro_batch_size=1)
    targets = torch.cat([data.valid.batch(k)[..., 1:].flatten() for k in range(data.valid.batches_per_epoch)])
    assert int(data.token_lengths[targets.numpy()].sum()) == len(data.tokenizer.decode(targets).encode())


def blend(folder: Path, *weights: float, names: str = "ab") -> DataConfig:
    entries = [BlendEntry(prefix=str(folder / n), weight=w) for n, w in zip(names, weights, strict=True)]
    return config(None, blend=entries)


def test_blend_draws_by_weight(folder):
    data = open_with(blend(folder, 3.0, 1.0), global_batch_size=8)
    alone = [open_with(config(folder / name)).train.samples for name in "ab"]
    drawn = [data.train.samples.source(index)[0] for index in range(8)]
    assert drawn == [0, 1, 0, 0] * 2
    assert torch.equal(data.train.batch(0).view(8, 17)[2], torch.from_numpy(alone[0][1]))
    assert data.valid.samples.samples_per_epoch >= 2


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_the_global_order(folder, dp_size):
    for settings in (config(folder / "a"), blend(folder, 0.3, 0.7)):
        options = {"global_batch_size": 8, "micro_batch_size": 1}
        whole = open_with(settings, **options)
        ranks = [open_with(settings, dp_rank=rank, dp_size=dp_size, **options) for rank in range(dp_size)]
        for step in (0, 1, 50):
            assert torch.equal(torch.cat([rank.train.batch(step) for rank in ranks]), whole.train.batch(step))
            assert torch.equal(torch.cat([rank.valid.batch(0) for rank in ranks]), whole.valid.batch(0))
        assert len({rank.train.state_dict(3)["fingerprint"] for rank in [whole, *ranks]}) == 1


def test_separate_validation_dataset(folder):
    data = open_with(config(folder / "a", valid_prefix=str(folder / "b"), split=(1.0, 0.0, 0.0)))
    b = IndexedDataset(folder / "b")
    assert data.valid.batch(0)[0, 0].tolist() == b.tokens(0, 17).tolist()
    assert data.valid.samples.num_tokens == b.num_tokens


@pytest.mark.parametrize("kind", ["one", "blend", "held out"])
def test_a_split_alone_has_the_batches_of_the_run(folder, kind):
    shares = {"split": (0.6, 0.0 if kind == "held out" else 0.2, 0.2)}
    data = config(folder / "a", **shares)
    if kind == "blend":
        data = blend(folder, 0.7, 0.3).model_copy(update=shares)
    if kind == "held out":
        data = config(folder / "a", valid_prefix=str(folder / "b"), **shares)
    whole = open_with(data, seed=3)
    for split in ("train", "valid", "test"):
        sizes = {"global_batch_size": 4, "micro_batch_size": 2}
        alone = open_split(data, split, vocab_size=300, seed=3, **sizes)
        expected = getattr(whole, split)
        assert alone.batches.batches_per_epoch == expected.batches_per_epoch
        for step in range(expected.batches_per_epoch):
            assert torch.equal(alone.batches.batch(step), expected.batch(step))
        assert alone.eod_id == whole.eod_id and (alone.token_lengths == whole.token_lengths).all()


def test_a_split_needs_only_its_own_files(folder):
    data = config(folder / "gone", valid_prefix=str(folder / "b"), split=(1, 0, 0))
    sizes = {"vocab_size": 300, "global_batch_size": 4, "micro_batch_size": 2, "seed": 3}
    assert open_split(data, "valid", **sizes).batches.batches_per_epoch > 0
    with pytest.raises(DataError, match=r"split` is \[1.0, 0.0, 0.0\]: no test split; choose train or valid"):
        open_split(config(folder / "a", valid_prefix=str(folder / "b"), split=(1, 0, 0)), "test", **sizes)


def test_foreign_dataset(folder):
    data = open_with(config(folder / "foreign"), vocab_size=250)
    assert data.tokenizer is None
    assert data.eod_id is None
    assert data.token_lengths is None
    assert data.train.batch(0).max() < 250
    with pytest.raises(DataError, match=r"has no foreign\.json .*\nset `tokenizer`, or `vocab_size`"):
        open_with(config(folder / "foreign"))
    with pytest.raises(DataError, match=r"mask_end_of_document` needs a tokenizer"):
        open_with(config(folder / "foreign", mask_end_of_document=True), vocab_size=250)
    named = open_with(config(folder / "foreign", tokenizer=str(folder / "a.model")))
    assert (named.vocab_size, named.eod_id) == (300, 1)
    assert named.token_lengths is None  # nothing proves that this tokenizer made it


def test_token_outside_the_vocabulary_of_a_foreign_dataset(folder):
    data = open_with(config(folder / "foreign", split=(1.0, 0.0, 0.0)), vocab_size=249)
    bad = next(k for k in range(data.train.samples.samples_per_epoch) if 249 in data.train.samples[k])
    with pytest.raises(DataError, match=r"foreign\.bin: token id 249 at document \d+, offset \d+ is outside"):
        data.train.batch(bad // 4)


def test_another_tokenizer(folder):
    with pytest.raises(DataError) as error:
        open_with(config(folder / "a", tokenizer=str(folder / "other.model")))
    message = str(error.value)
    assert message.startswith(
        f"tokenizer {folder / 'other.model'} is not the one that dataset {folder / 'a'} was"
    )
    assert load_tokenizer(folder / "a.model").sha256 in message
    assert load_tokenizer(folder / "other.model").sha256 in message
    assert message.count("\n") <= 4


def test_blend_of_different_tokenizers(folder):
    entries = [BlendEntry(prefix=str(folder / name), weight=1.0) for name in ("a", "other")]
    with pytest.raises(DataError, match=r"a\.model is not the one that dataset .*other was built with"):
        open_with(config(None, blend=entries))


def test_changed_tokenizer_file(folder, tmp_path):
    for suffix in ("bin", "idx", "json", "model"):
        (tmp_path / f"a.{suffix}").write_bytes((folder / f"a.{suffix}").read_bytes())
    (tmp_path / "a.model").write_bytes((folder / "other.model").read_bytes())
    with pytest.raises(DataError, match=r"a\.model is not the one that dataset"):
        open_with(config(tmp_path / "a"))
    (tmp_path / "a.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer .*a\.model: No such file"):
        open_with(config(tmp_path / "a"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 5}, "the files do not belong together"),
        ({"tokenizer_file": "../a.model"}, "tokenizer_file: String should match"),
        ({"tokenizer_file": "/etc/passwd"}, "tokenizer_file: String should match"),
        ({"tokenizer_file": ".."}, "tokenizer_file: String should match"),
        ({"version": 2}, "version: Input should be 1"),
        ({"vocab_size": "300"}, "vocab_size: Input should be a valid integer"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        (None, "not the description of a dataset: Invalid JSON"),
    ],
)
def test_damaged_sidecar(folder, tmp_path, change, message):
    for suffix in ("bin", "idx", "json", "model"):
        (tmp_path / f"a.{suffix}").write_bytes((folder / f"a.{suffix}").read_bytes())
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text("{" if change is None else json.dumps(content | change))
    with pytest.raises(DataError, match=message) as error:
        open_with(config(tmp_path / "a"))
    assert "a.json" in str(error.value)


def test_model_vocabulary_too_small(folder):
    with pytest.raises(DataError, match=r"`vocab_size` \(299\) is smaller .*\(300\)\nset it to 300"):
        open_with(config(folder / "a"), vocab_size=299)
    assert open_with(config(folder / "a"), vocab_size=512).vocab_size == 512


def test_a_vocabulary_smaller_than_that_of_a_named_tokenizer(folder) -> None:
    named = config(folder / "foreign", tokenizer=str(folder / "a.model"))
    with pytest.raises(DataError, match=r"`vocab_size` \(299\) is smaller .*a\.model \(300\)\nset it to"):
        open_with(named, vocab_size=299)


def test_a_vocabulary_far_above_the_tokenizers_is_told(folder) -> None:
    def told(vocab_size: int | None, name: str = "a") -> list[str]:
        return open_with(config(folder / name), vocab_size=vocab_size).warnings()

    assert told(None) == told(300) == told(304) == told(512) == told(1024) == []  # padding
    assert told(50304, "foreign") == []  # no tokenizer to compare with
    assert told(1025) == [
        f"`vocab_size` (1025) is far above the 300 tokens of {folder / 'a.model'}: 725 rows of embedding "
        "and head are computed and never used; write `vocab_size`=null to take the tokenizer's, or "
        "`vocab_size`=300"
    ]


def test_missing_dataset(tmp_path):
    with pytest.raises(DataError) as error:
        open_with(config(tmp_path / "none"))
    assert f"{tmp_path / 'none.bin'}\n" in str(error.value)
    assert f"{tmp_path / 'none.idx'}\n" in str(error.value)


def test_sizes(folder):
    with pytest.raises(
        DataError, match=r"train: 48 documents.*too small for one global batch\nneeded: 1000 samples"
    ):
        open_with(config(folder / "a"), global_batch_size=1000)
    with pytest.raises(DataError, match=r"valid: 1 documents"):
        open_with(config(folder / "a", split=(59 / 60, 1 / 60, 0.0)), global_batch_size=32)
    with pytest.raises(DataError, match=r"needed for one sample: 100001 tokens"):
        open_with(config(folder / "a", seq_length=100_000))


def test_inspect(folder):
    text = inspect_dataset(folder / "a", documents=2, max_tokens=5, scan=True)
    data = IndexedDataset(folder / "a")
    assert f"60 documents, {data.num_tokens} tokens of type uint16" in text
    assert f"all {data.num_tokens} tokens are in [0, 300)" in text
    assert text.count("--- document") == 2
    assert repr(load_tokenizer(folder / "a.model").decode(data.document(0)[:5]))[1:5] in text
    raw = inspect_dataset(folder / "foreign", documents=1, max_tokens=4)
    assert "tokenizer: unknown" in raw
    assert raw.endswith("\n0 1 2 3")
    with pytest.raises(DataError, match="scanning needs the vocabulary"):
        inspect_dataset(folder / "foreign", scan=True)
    with pytest.raises(DataError, match="is not the one that dataset"):
        inspect_dataset(folder / "a", tokenizer=folder / "other.model")


def test_inspect_escapes_control_characters(tmp_path, folder):
    (tmp_path / "a.txt").write_text("red \x1b[31m and bell \x07\n")
    prepare([tmp_path / "a.txt"], tmp_path / "d", tokenizer=folder / "a.model", workers=1)
    text = inspect_dataset(tmp_path / "d")
    assert "\x1b" not in text
    assert "red \\x1b[31m and bell \\x07" in text


def test_inspect_finds_tokens_outside_the_vocabulary(folder):
    """A foreign file shown with a tokenizer that is not its own."""
    with IndexedDatasetWriter(folder / "big", vocab_size=5000) as writer:
        writer.add_document(np.array([1, 2, 4000]))
        writer.finish()
    with pytest.raises(DataError, match=r"4000.*outside"):
        inspect_dataset(folder / "big", tokenizer=folder / "a.model")
    with pytest.raises(DataError, match="token id 4000 at document 0, offset 2"):
        inspect_dataset(folder / "big", tokenizer=folder / "a.model", scan=True)
