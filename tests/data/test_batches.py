"""Global batches: the union over ranks is the global order; positions belong to their data (10, 15, 17)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fp8train.data.batches import GlobalBatches
from fp8train.data.errors import DataError
from fp8train.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fp8train.data.samples import SampleDataset

VOCAB = 1000


def samples(
    prefix: Path, *, seq_length: int = 8, seed: int = 1, tokens: np.ndarray | None = None
) -> SampleDataset:
    if tokens is None:
        tokens = np.arange(1000) % VOCAB
    with IndexedDatasetWriter(prefix, vocab_size=65536) as writer:
        writer.add_documents(tokens, [len(tokens) // 10] * 10)
        writer.finish()
    return SampleDataset(IndexedDataset(prefix), documents=(0, 10), seq_length=seq_length, seed=seed)


def batches(source: SampleDataset, *, rank: int = 0, size: int = 1, **options) -> GlobalBatches:
    options = {"global_batch_size": 8, "micro_batch_size": 2, "vocab_size": VOCAB} | options
    return GlobalBatches(source, dp_rank=rank, dp_size=size, **options)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 3, 100])
def test_union_of_ranks_is_the_global_order(tmp_path, size, step):
    source = samples(tmp_path / "d")
    parts = [batches(source, rank=rank, size=size).batch(step) for rank in range(size)]
    for part in parts:
        assert part.shape == (4 // size, 2, 9)
        assert part.dtype == torch.int64
        assert part.device.type == "cpu"
    union = torch.cat(parts).view(8, 9)
    expected = torch.stack([torch.from_numpy(source[step * 8 + k]) for k in range(8)])
    assert torch.equal(union, expected)


def test_micro_batch_size_does_not_change_the_order(tmp_path):
    source = samples(tmp_path / "d")
    flat = {
        batches(source, micro_batch_size=size).batch(2).view(8, 9).numpy().tobytes() for size in (1, 2, 4, 8)
    }
    assert len(flat) == 1


def test_batches_per_epoch(tmp_path):
    data = batches(samples(tmp_path / "d"))
    assert data.samples.samples_per_epoch == 124
    assert data.batches_per_epoch == 15


def test_too_small_for_one_global_batch(tmp_path):
    source = samples(tmp_path / "d", seq_length=200)  # 4 samples
    assert batches(source, global_batch_size=4).batch(0).shape == (2, 2, 201)
    with pytest.raises(DataError, match=r"too small for one global batch\nneeded: 8 samples .* present: 4\n"):
        batches(source)


def test_token_outside_the_vocabulary(tmp_path):
    tokens = np.arange(1000)
    tokens[345] = VOCAB + 7  # document 3, offset 45
    data = batches(samples(tmp_path / "d", tokens=tokens))
    bad = next(index for index in range(120) if VOCAB + 7 in data.samples[index])
    with pytest.raises(DataError) as error:
        data.batch(bad // 8)
    first = str(error.value).split("\n")[0]
    assert first.endswith("d.bin: token id 1007 at document 3, offset 45 is outside the vocabulary [0, 1000)")
    data.batch(bad // 8 + 1)
    batches(data.samples, vocab_size=VOCAB + 8).batch(0)


def test_position_round_trip(tmp_path):
    saved = batches(samples(tmp_path / "d"), size=4, rank=3).state_dict(17)
    assert saved["step"] == 17
    (tmp_path / "moved").mkdir()
    moved = samples(tmp_path / "moved" / "d")  # same content, another place and another number of ranks
    assert batches(moved, size=2).load_state_dict(saved) == 17
    assert saved == batches(samples(tmp_path / "d"), rank=0).state_dict(17)


def test_position_of_other_data_is_refused(tmp_path):
    saved = batches(samples(tmp_path / "a")).state_dict(5)
    other = batches(samples(tmp_path / "b", tokens=np.arange(1000)[::-1].copy()))
    with pytest.raises(DataError) as error:
        other.load_state_dict(saved)
    message = str(error.value)
    assert f"checkpoint: {tmp_path / 'a'} (train: 10 documents, 1000 tokens)" in message
    assert f"now:        {tmp_path / 'b'} (train: 10 documents, 1000 tokens)" in message
    assert saved["fingerprint"][:16] in message
    assert other.samples.fingerprint[:16] in message
    with pytest.raises(DataError, match="shuffle seed"):
        batches(samples(tmp_path / "a", seed=2)).load_state_dict(saved)


def test_position_of_other_sizes_is_refused(tmp_path):
    saved = batches(samples(tmp_path / "a")).state_dict(5)
    with pytest.raises(DataError, match=r"`seq_length` is 4, but the checkpoint's .* with 8"):
        batches(samples(tmp_path / "a", seq_length=4)).load_state_dict(saved)


@pytest.mark.parametrize("recorded", [True, False])
def test_another_batch_size_goes_on_from_the_sample(tmp_path, recorded):
    """Also a second time, on other ranks, and from checkpoints that did not record the sample."""
    source = samples(tmp_path / "a")
    saved = batches(source).state_dict(5)
    assert saved["samples"] == 40
    if not recorded:
        del saved["samples"]
    larger = batches(source, global_batch_size=16)
    assert larger.load_state_dict(saved) == 5
    expected = [torch.from_numpy(source[40 + 16 + number]) for number in range(16)]
    assert torch.equal(larger.batch(6).view(16, 9), torch.stack(expected))
    again = batches(source, global_batch_size=4, size=2, rank=1)
    assert again.load_state_dict(larger.state_dict(7)) == 7
    expected = [torch.from_numpy(source[40 + 32 + number]) for number in (2, 3)]
    assert torch.equal(again.batch(7).view(2, 9), torch.stack(expected))
    assert again.samples_before(9) == 80


def test_a_resume_in_the_middle_of_an_epoch_sees_the_same_samples(tmp_path):
    """124 samples are 15.5 batches: steps 12 to 19 cross into the second epoch."""
    source = samples(tmp_path / "a")
    whole = batches(source)
    saved = whole.state_dict(12)
    for size, micro in ((1, 8), (2, 4), (2, 1), (4, 2), (8, 1)):
        parts = [batches(source, rank=rank, size=size, micro_batch_size=micro) for rank in range(size)]
        assert {part.load_state_dict(saved) for part in parts} == {12}
        for step in range(12, 20):
            union = torch.cat([part.batch(step).view(-1, 9) for part in parts])
            assert torch.equal(union, whole.batch(step).view(8, 9)), (size, micro, step)


RAMP = ((2, 4), (3, 6))
"""Batches of 8 after 2 of 4 and 3 of 6: steps begin at 0, 4, 8, 14, 20, 26, 34, ..."""


def test_a_ramp_keeps_its_place_on_any_ranks(tmp_path):
    source = samples(tmp_path / "a")
    begins = [0, 4, 8, 14, 20, 26, 34, 42]
    whole = batches(source, ramp=RAMP)
    assert [whole.samples_before(step) for step in range(8)] == begins
    saved = whole.state_dict(3)
    assert saved["samples"] == 14
    for size, micro in ((1, 2), (2, 1), (2, 2)):
        if 6 % (size * micro):
            continue  # the configuration is refused
        parts = [batches(source, rank=r, size=size, micro_batch_size=micro, ramp=RAMP) for r in range(size)]
        assert {part.load_state_dict(saved) for part in parts} == {3}
        for step in range(3, 7):
            union = torch.cat([part.batch(step).view(-1, 9) for part in parts])
            expected = [torch.from_numpy(source[i]) for i in range(begins[step], begins[step + 1])]
            assert torch.equal(union, torch.stack(expected)), (size, micro, step)
