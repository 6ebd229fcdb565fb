"""Our files and megatron-core's, in both directions, byte for byte."""

import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

INSTALL = "needs megatron-core: pip install packaging && pip install --no-deps megatron-core==0.16.1"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 against their builder
pytest.importorskip("megatron.core", reason=INSTALL, exc_type=ImportError)


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about its own optional accelerators
        return importlib.import_module("megatron.core.datasets.indexed_dataset")


def documents(vocab_size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    lengths = [7, 1, 0, 300, 12, 4000]
    return [rng.integers(0, vocab_size, size=length) for length in lengths]


def write_ours(prefix: Path, vocab_size: int) -> None:
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents(vocab_size):
            writer.add_document(document)
        writer.finish()


def write_theirs(megatron, prefix: Path, vocab_size: int) -> None:
    dtype = megatron.DType.optimal_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents(vocab_size):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 65536, 128256])
def test_same_bytes(megatron, tmp_path, vocab_size):
    write_ours(tmp_path / "ours", vocab_size)
    write_theirs(megatron, tmp_path / "theirs", vocab_size)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


@pytest.mark.parametrize("vocab_size", [300, 65500])
@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_reads_ours(megatron, tmp_path, vocab_size, mmap):
    write_ours(tmp_path / "ours", vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"), mmap=mmap)
    expected = documents(vocab_size)
    assert len(theirs) == len(expected)
    assert theirs.document_indices.tolist() == list(range(len(expected) + 1))
    assert theirs.sequence_lengths.tolist() == [len(document) for document in expected]
    for number, document in enumerate(expected):
        np.testing.assert_array_equal(theirs[number], document)
        assert theirs[number].tobytes() == IndexedDataset(tmp_path / "ours").document(number).tobytes()


@pytest.mark.parametrize("vocab_size", [300, 65500])
def test_we_read_megatrons(megatron, tmp_path, vocab_size):
    write_theirs(megatron, tmp_path / "theirs", vocab_size)
    data = IndexedDataset(tmp_path / "theirs")
    expected = documents(vocab_size)
    assert data.num_documents == len(expected)
    for number, document in enumerate(expected):
        np.testing.assert_array_equal(data.document(number), document)
    data.check_vocab(vocab_size)


def test_documents_of_several_sequences(megatron, tmp_path):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(str(tmp_path / "a.idx"))
    data = IndexedDataset(tmp_path / "a")
    assert [data.document(k).tolist() for k in range(data.num_documents)] == [[1, 2, 3, 4, 5], [6]]


@pytest.mark.parametrize("shares", [(0.98, 0.02, 0.0), (969, 30, 1), (1, 1, 1), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("count", [1, 7, 655, 100_003])
def test_same_split_bounds(megatron, shares, count):
    """Their bounds, from their matrix of shares and the rounding of their dataset builder."""
    from megatron.core.datasets import blended_megatron_dataset_config as theirs

    from fp8train.data.samples import split_documents

    normalised = theirs.parse_and_normalize_split(", ".join(map(str, shares)))
    matrix = theirs.convert_split_vector_to_split_matrix(normalised)
    for ours, bounds in zip(split_documents(count, shares), matrix, strict=True):
        if bounds is None:
            assert ours[0] == ours[1]
        else:
            assert ours == (round(bounds[0] * count), round(bounds[1] * count))
