"""Samples: every token predicted once per epoch, disjoint splits, order a function of data and seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fp8train.data.samples import SampleDataset, split_documents

SHAPES = {
    "many small": [1 + k % 4 for k in range(200)],
    "few huge": [500, 3, 700],
    "one": [321],
    "with empty ones": [0, 5, 0, 0, 40, 0, 9, 0],
}


def dataset(folder: Path, lengths: list[int]) -> IndexedDataset:
    """Token p of the file is p: a sample then shows where it came from."""
    with IndexedDatasetWriter(folder / "d", vocab_size=65536 * 4) as writer:
        writer.add_documents(np.arange(sum(lengths)), lengths)
        writer.finish()
    return IndexedDataset(folder / "d")


def samples_of(data: IndexedDataset, *, seq_length: int, **options) -> SampleDataset:
    options = {"documents": (0, data.num_documents), "seed": 3} | options
    return SampleDataset(data, seq_length=seq_length, **options)


def stream_of_epoch(samples: SampleDataset, epoch: int) -> list[int]:
    """The epoch's stream put together again from its samples, by their overlapping ends."""
    count = samples.samples_per_epoch
    read = [samples[epoch * count + number].tolist() for number in range(count)]
    by_stream = {}
    for number in range(count):
        by_stream[samples._epoch_and_number(epoch * count + number)[1]] = read[number]
    stream = by_stream[0][:1]
    for number in range(count):
        assert stream[-1] == by_stream[number][0]
        stream += by_stream[number][1:]
    return stream


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seq_length", [1, 7, 16])
def test_epoch_coverage(tmp_path, shape, seq_length):
    """Each epoch predicts every token at most once, and all but the first and the last few."""
    data = dataset(tmp_path, SHAPES[shape])
    samples = samples_of(data, seq_length=seq_length)
    assert samples.samples_per_epoch == (data.num_tokens - 1) // seq_length
    for epoch in (0, 1, 5):
        stream = stream_of_epoch(samples, epoch)
        assert len(stream) == samples.samples_per_epoch * seq_length + 1
        assert max(Counter(stream).values()) == 1
        assert data.num_tokens - len(stream) < seq_length
        check_documents_stay_whole(data, stream)


def check_documents_stay_whole(data: IndexedDataset, stream: list[int]) -> None:
    """The stream is documents of the file, each from its start to its end, the last one possibly cut."""
    starts = {
        int(s): int(e)
        for s, e in zip(data.document_offsets, data.document_offsets[1:], strict=False)
        if e > s
    }
    position = 0
    while position < len(stream):
        begin = stream[position]
        length = min(starts.pop(begin) - begin, len(stream) - position)
        assert stream[position : position + length] == list(range(begin, begin + length))
        position += length


def test_epochs_differ_and_repeat(tmp_path):
    samples = samples_of(dataset(tmp_path, SHAPES["many small"]), seq_length=8)
    count = samples.samples_per_epoch
    epochs = [[samples[epoch * count + k].tolist() for k in range(count)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert {tuple(s) for s in epochs[0]} != {tuple(s) for s in epochs[1]}  # documents moved, not samples only
    # any order of access gives the same samples
    for index in (2 * count + 3, 0, count, 2 * count - 1, 5):
        assert samples[index].tolist() == epochs[index // count][index % count]


def test_pure_function_of_seed(tmp_path):
    data = dataset(tmp_path, SHAPES["many small"])
    first = [samples_of(data, seq_length=8, seed=1)[k].tolist() for k in range(20)]
    assert first == [
        samples_of(IndexedDataset(data.prefix), seq_length=8, seed=1)[k].tolist() for k in range(20)
    ]
    assert first != [samples_of(data, seq_length=8, seed=2)[k].tolist() for k in range(20)]


def test_sample_type(tmp_path):
    sample = samples_of(dataset(tmp_path, [100]), seq_length=8)[0]
    assert sample.dtype == np.int64
    assert sample.shape == (9,)
    sample[0] = 5  # a copy, not the file


def test_validation_keeps_file_order(tmp_path):
    data = dataset(tmp_path, SHAPES["many small"])
    samples = samples_of(data, seq_length=10, documents=(100, 200), shuffle=False)
    first = int(data.document_offsets[100])
    for k in (0, 1, samples.samples_per_epoch - 1):
        assert samples[k].tolist() == list(range(first + 10 * k, first + 10 * k + 11))
    assert samples[samples.samples_per_epoch].tolist() == samples[0].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_place(tmp_path, shape, shuffle):
    data = dataset(tmp_path, SHAPES[shape])
    samples = samples_of(data, seq_length=5, shuffle=shuffle)
    for index in (0, 3, samples.samples_per_epoch + 1):
        for position, token in enumerate(samples[index].tolist()):
            place = samples.place(index, position)
            assert data.document(place.document)[place.offset] == token
            assert place.prefix == data.prefix


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (100, (0.98, 0.02, 0.0), [(0, 98), (98, 100), (100, 100)]),
        (100, (969, 30, 1), [(0, 97), (97, 100), (100, 100)]),
        (655, (0.98, 0.02, 0), [(0, 642), (642, 655), (655, 655)]),
        (7, (1, 1, 1), [(0, 2), (2, 5), (5, 7)]),
        (3, (1, 0, 0), [(0, 3), (3, 3), (3, 3)]),
        (0, (0.9, 0.1, 0), [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_split_bounds(count, shares, expected):
    assert split_documents(count, shares) == expected


def test_splits_are_disjoint_and_complete(tmp_path):
    data = dataset(tmp_path, [11] * 60)
    seen = []
    for number, documents in enumerate(split_documents(60, (0.7, 0.2, 0.1))):
        samples = samples_of(data, seq_length=1, documents=documents, shuffle=number == 0)
        tokens = {int(t) for k in range(samples.samples_per_epoch) for t in samples[k]}
        seen.append(tokens)
        assert tokens == set(range(11 * documents[0], 11 * documents[1]))
    assert set.union(*seen) == set(range(660))
    assert sum(map(len, seen)) == 660


def test_too_small_for_one_sample(tmp_path):
    data = dataset(tmp_path, [5, 5])
    assert samples_of(data, seq_length=9).samples_per_epoch == 1
    with pytest.raises(
        DataError, match=r"d \(train: 2 documents, 10 tokens\): needed .* 11 tokens .* present: 10"
    ):
        samples_of(data, seq_length=10)
    with pytest.raises(DataError, match=r"valid: 0 documents, 0 tokens\): needed .* present: 0"):
        samples_of(data, seq_length=1, documents=(1, 1), split="valid")


def test_fingerprint(tmp_path):
    data = dataset(tmp_path, [50] * 4)
    base = samples_of(data, seq_length=4)
    assert base.fingerprint == samples_of(IndexedDataset(data.prefix), seq_length=4).fingerprint
    others = [
        samples_of(data, seq_length=5),
        samples_of(data, seq_length=4, seed=4),
        samples_of(data, seq_length=4, documents=(0, 3)),
        samples_of(data, seq_length=4, shuffle=False),
    ]
    (tmp_path / "other").mkdir()
    others.append(samples_of(dataset(tmp_path / "other", [50, 50, 51, 49]), seq_length=4))
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_million_documents(tmp_path):
    """Index build is vectorised: this takes a second or so, not minutes."""
    lengths = np.full(1_000_000, 3)
    with IndexedDatasetWriter(tmp_path / "big", vocab_size=300) as writer:
        writer.add_documents(np.arange(3_000_000) % 300, lengths.tolist())
        writer.finish()
    samples = samples_of(IndexedDataset(tmp_path / "big"), seq_length=128)
    assert len({samples[k].tobytes() for k in range(50)}) == 50
