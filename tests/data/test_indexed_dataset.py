"""The .bin/.idx files: bytes by hand, round trips, and every way a file can be damaged (fault rows 12-15)."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

DOCUMENTS = [[1, 2, 3], [], [65499 - 1, 7], [9]]


def write(prefix: Path, documents=DOCUMENTS, vocab_size: int = 65499) -> Path:
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
        writer.finish()
    return prefix


def idx_bytes(code: int, itemsize: int, lengths: list[int], boundaries: list[int]) -> bytes:
    """The format, written a second time with struct only."""
    pointers = [itemsize * sum(lengths[:k]) for k in range(len(lengths))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", len(lengths))
        + struct.pack("<Q", len(boundaries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )


def test_bytes_uint16(tmp_path):
    write(tmp_path / "a")
    assert (tmp_path / "a.idx").read_bytes() == idx_bytes(8, 2, [3, 0, 2, 1], [0, 1, 2, 3, 4])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 65498, 7, 9)


def test_bytes_by_hand(tmp_path):
    write(tmp_path / "a", [[5, 6]], vocab_size=300)
    assert (tmp_path / "a.idx").read_bytes().hex() == (
        "4d4d49444944580000" "0100000000000000" "08" "0100000000000000" "0200000000000000"
        "02000000" "0000000000000000" "0000000000000000" "0100000000000000"
    )  # fmt: skip
    assert (tmp_path / "a.bin").read_bytes().hex() == "05000600"


def test_int32_from_65500_on(tmp_path):
    write(tmp_path / "a", [[65499], [1, 2]], vocab_size=65500)
    assert (tmp_path / "a.idx").read_bytes() == idx_bytes(4, 4, [1, 2], [0, 1, 2])
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<3i", 65499, 1, 2)


def test_round_trip(tmp_path):
    data = IndexedDataset(write(tmp_path / "a.b"))  # a dot in the name is not a suffix
    assert [data.document(k).tolist() for k in range(data.num_documents)] == DOCUMENTS
    assert data.num_tokens == 6
    assert data.tokens(2, 5).tolist() == [3, 65498, 7]
    assert [data.place(p) for p in range(6)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (3, 0)]


def test_empty_dataset(tmp_path):
    data = IndexedDataset(write(tmp_path / "a", []))
    assert (data.num_documents, data.num_tokens) == (0, 0)
    data.check_vocab(1)
    assert len(data.fingerprint()) == 64


def test_documents_of_several_sequences(tmp_path):
    (tmp_path / "a.idx").write_bytes(idx_bytes(8, 2, [1, 2, 1, 0], [0, 2, 2, 4]))
    (tmp_path / "a.bin").write_bytes(struct.pack("<4H", 1, 2, 3, 4))
    data = IndexedDataset(tmp_path / "a")
    assert [data.document(k).tolist() for k in range(data.num_documents)] == [[1, 2, 3], [], [4]]


def test_unfinished_writer_leaves_nothing(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", vocab_size=10) as writer:
        writer.add_document(np.array([1]))
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_tokens_outside_vocab(tmp_path):
    for token in (-1, 10):
        with (
            pytest.raises(DataError, match=f"id {token}, outside its vocabulary"),
            IndexedDatasetWriter(tmp_path / "a", vocab_size=10) as writer,
        ):
            writer.add_document(np.array([1, token]))


@pytest.mark.parametrize("gone", [["bin"], ["idx"], ["bin", "idx"]])
def test_missing_file_lists_both_paths(tmp_path, gone):
    prefix = write(tmp_path / "a")
    for suffix in gone:
        Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(DataError) as error:
        IndexedDataset(prefix)
    assert f"{prefix}.bin\n" in str(error.value)
    assert f"{prefix}.idx\n" in str(error.value)
    assert "missing: " + ", ".join(f"a.{suffix}" for suffix in gone) in str(error.value)


def test_prefix_with_suffix_gets_a_hint(tmp_path):
    prefix = write(tmp_path / "a")
    with pytest.raises(DataError, match=f"without its suffix: {prefix}$"):
        IndexedDataset(f"{prefix}.bin")


GOOD = idx_bytes(8, 2, [3, 0, 2, 1], [0, 1, 2, 3, 4])
DAMAGED = {
    "empty": (b"", "not an index"),
    "other file": (b"PK\x03\x04" + bytes(100), "not an index"),
    "magic only": (GOOD[:20], "truncated: 20 bytes, the header alone needs 34"),
    "version": (GOOD[:9] + struct.pack("<Q", 7) + GOOD[17:], "index version 7"),
    "dtype": (GOOD[:17] + b"\x09" + GOOD[18:], "unknown dtype code 9"),
    "float": (GOOD[:17] + b"\x07" + GOOD[18:], "floating-point"),
    "truncated": (GOOD[:-1], rf"truncated: {len(GOOD) - 1} bytes, .* needs {len(GOOD)}"),
    "too long": (GOOD + b"\x00", rf"too long: {len(GOOD) + 1} bytes"),
    "modes": (GOOD + bytes(4), "multimodal"),
    "huge counts": (GOOD[:18] + struct.pack("<Q", 2**63) + GOOD[26:], "truncated"),
    "no boundaries": (idx_bytes(8, 2, [], []), "no document boundaries"),
    "boundary start": (idx_bytes(8, 2, [3, 3], [1, 2]), "must rise from 0 to 2"),
    "boundary end": (idx_bytes(8, 2, [3, 3], [0, 1]), "must rise from 0 to 2"),
    "boundary order": (idx_bytes(8, 2, [3, 1, 2], [0, 2, 1, 3]), "not in order"),
    "negative length": (idx_bytes(8, 2, [7, -1], [0, 1, 2]), "sequence 1 has length -1"),
    "pointer": (idx_bytes(8, 4, [3, 3], [0, 1, 2]), "sequence 1 points at byte 12, .* byte 6"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_index(tmp_path, name):
    content, message = DAMAGED[name]
    prefix = write(tmp_path / "a")
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        IndexedDataset(prefix)
    assert "a.idx" in str(error.value)
    assert 1 <= str(error.value).count("\n") + 1 <= 5


@pytest.mark.parametrize(("change", "word"), [(-1, "shorter"), (-2, "shorter"), (1, "longer"), (2, "longer")])
def test_bin_size(tmp_path, change, word):
    prefix = write(tmp_path / "a")
    path = Path(f"{prefix}.bin")
    path.write_bytes((path.read_bytes() + bytes(2))[: 12 + change])
    with pytest.raises(DataError, match=f"{12 + change} bytes, .* = 12: the file is {word}"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(("token", "vocab_size"), [(50, 50), (65535, 60000)])
def test_scan_names_the_document(tmp_path, token, vocab_size):
    documents = [[1] * 10, [2] * 5, [3] * 7 + [token] + [4] * 3]
    data = IndexedDataset(write(tmp_path / "a", documents, vocab_size=65536))
    data.check_vocab(vocab_size, 0, 22)
    data.check_vocab(token + 1)
    with pytest.raises(DataError, match=f"token id {token} at document 2, offset 7 .*\\[0, {vocab_size}\\)"):
        data.check_vocab(vocab_size)


def test_scan_finds_negative_tokens(tmp_path):
    (tmp_path / "a.idx").write_bytes(idx_bytes(4, 4, [2, 2], [0, 1, 2]))
    (tmp_path / "a.bin").write_bytes(struct.pack("<4i", 1, 2, 3, -5))
    with pytest.raises(DataError, match="token id -5 at document 1, offset 1"):
        IndexedDataset(tmp_path / "a").check_vocab(100)


def test_fingerprint_follows_content_not_name(tmp_path):
    one, two = IndexedDataset(write(tmp_path / "a")), IndexedDataset(write(tmp_path / "b"))
    assert one.fingerprint() == two.fingerprint()
    other_token = IndexedDataset(write(tmp_path / "c", [[1, 2, 4], [], [65498, 7], [9]]))
    other_cut = IndexedDataset(write(tmp_path / "d", [[1, 2], [3], [65498, 7], [9]]))
    assert len({data.fingerprint() for data in (one, other_token, other_cut)}) == 3


def test_fingerprint_of_a_large_file(tmp_path):
    tokens = np.arange(2_000_000) % 60000
    one = IndexedDataset(write(tmp_path / "a", [tokens], vocab_size=65000))
    tokens[-1] += 1
    two = IndexedDataset(write(tmp_path / "b", [tokens], vocab_size=65000))
    assert one.fingerprint() != two.fingerprint()


def open_or_data_error(prefix: Path) -> IndexedDataset | None:
    try:
        data = IndexedDataset(prefix)
    except DataError:
        return None
    total = sum(len(data.document(k)) for k in range(data.num_documents))
    assert total == data.num_tokens == Path(f"{prefix}.bin").stat().st_size // data.dtype.itemsize
    return data


def test_truncations_and_bit_flips(tmp_path):
    """A damaged index is a DataError, or still describes exactly the tokens that are there."""
    documents = [[k] * (k % 5) for k in range(40)]
    prefix = write(tmp_path / "a", documents, vocab_size=300)
    path = Path(f"{prefix}.idx")
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert open_or_data_error(prefix) is None
    rng = random.Random(20240)
    survivors = 0
    for bit in [*range(34 * 8), *(rng.randrange(34 * 8, len(good) * 8) for _ in range(400))]:
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        survivors += open_or_data_error(prefix) is not None
    assert survivors < 20  # only document boundaries can move unnoticed, and only while they stay in order


@settings(max_examples=150, deadline=None)
@given(
    header=st.binary(min_size=0, max_size=60),
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), max_size=6),
)
def test_fuzz(tmp_path_factory, header, flips):
    prefix = write(tmp_path_factory.mktemp("fuzz") / "a")
    content = bytearray(GOOD)
    for position, mask in flips:
        content[position] ^= mask
    Path(f"{prefix}.idx").write_bytes(content)
    open_or_data_error(prefix)
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\x00\x00" + header)
    open_or_data_error(prefix)


OPEN = """
import resource, sys
import numpy, fp8train.data.indexed_dataset as d
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    d.IndexedDataset(sys.argv[1])
except d.DataError as error:
    print("DataError", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [34, 46, 12 * 10**9 + 42])
def test_a_header_that_claims_gigabytes_costs_no_memory(tmp_path, size):
    """A process that may have 1 GiB opens indexes of a few bytes whose counts are of a billion sequences, and
    a sparse one that is as long as it says."""
    write(tmp_path / "a")
    with open(tmp_path / "a.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 10**9, 1))
        stream.truncate(size)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "a"), str(2**30)], capture_output=True, text=True
    )
    assert done.stdout.startswith("DataError"), done.stderr
