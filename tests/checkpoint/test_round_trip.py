"""Saving and loading in one process: every bit of every dtype comes back, nothing fits that should not."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from fp8train.checkpoint.description import read_meta_file
from fp8train.checkpoint.errors import CheckpointError
from fp8train.checkpoint.logical import LogicalTensor
from fp8train.checkpoint.rng import capture_rng, restore_rng
from fp8train.checkpoint.save import save_checkpoint
from tests.checkpoint.loading import load_checkpoint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _save(root: Path, tensors: dict, step: int = 1, **meta: object) -> Path:
    return save_checkpoint(root, step, tensors, meta=meta, rank_state={}, group=None, keep_last=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    # Random bytes: subnormals, NaN payloads and infinities included. bool has two patterns only.
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 5 * dtype.itemsize), dtype=torch.uint8)
    saved = raw.view(dtype)
    path = _save(tmp_path, {"x": saved})
    loaded = torch.zeros(6, 5, dtype=torch.uint8).to(dtype)
    load_checkpoint(path, {"x": loaded}, group=None)
    assert _bytes(loaded) == raw.numpy().tobytes()


def test_an_index_by_any_python_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3 pickle a member of an enum as ``getattr(enum, name)``, others by its value."""
    x = torch.arange(6.0)
    for number, reduced in enumerate(
        (
            lambda member, _: (getattr, (type(member), member.name)),
            lambda member, _: (type(member), (member.value,)),
        )
    ):
        monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
        path = _save(tmp_path, {"x": x}, step=number + 1)
        assert (b"getattr" in (path / ".metadata").read_bytes()) == (number == 0)
        loaded = torch.zeros(6)
        load_checkpoint(path, {"x": loaded}, group=None)
        assert torch.equal(loaded, x)


def test_all_256_float8_codes_survive_in_both_formats(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    path = _save(tmp_path, {"e4m3": codes.view(torch.float8_e4m3fn), "e5m2": codes.view(torch.float8_e5m2)})
    loaded = {
        "e4m3": torch.zeros(256).to(torch.float8_e4m3fn),
        "e5m2": torch.zeros(256).to(torch.float8_e5m2),
    }
    load_checkpoint(path, loaded, group=None)
    assert torch.equal(loaded["e4m3"].view(torch.uint8), codes)
    assert torch.equal(loaded["e5m2"].view(torch.uint8), codes)


def test_odd_shapes_strides_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "parameter": torch.nn.Parameter(base.clone()),
        "layers.0.weight/with odd name ü": base[1],
    }
    path = _save(tmp_path, saved)
    loaded = {key: torch.full(value.shape, -1.0) for key, value in saved.items()}
    loaded["transposed"] = torch.full((4, 6), -1.0).t()
    loaded["parameter"] = torch.nn.Parameter(torch.full((4, 6), -1.0))
    load_checkpoint(path, loaded, group=None)
    for key, value in saved.items():
        assert torch.equal(loaded[key], value), key
    assert loaded["parameter"].requires_grad
    assert loaded["parameter"].grad is None


def test_saving_does_not_write_more_than_the_view(tmp_path: Path) -> None:
    path = _save(tmp_path, {"row": torch.zeros(1000, 1000)[0]})
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    digests = []
    for run in ("a", "b"):
        path = _save(tmp_path / run, {"x": torch.arange(10.0), "y": torch.ones(3)}, lr=0.1)
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {".metadata", "__0_0.distcp", "meta.json", "manifest.json"}


def test_meta_and_rank_state_come_back_exactly(tmp_path: Path) -> None:
    meta = {
        "lr": 0.1 + 0.2,
        "none": None,
        "nested": {"list": [1, 2.5, "ü"]},
        "big": 2**62,
        "nan": float("nan"),
    }
    path = save_checkpoint(
        tmp_path, 7, {}, meta=meta, rank_state={"rng": torch.tensor([1, 2])}, group=None, keep_last=1
    )
    loaded = load_checkpoint(path, {}, group=None)
    assert loaded.step == 7
    assert loaded.world_size == 1
    assert path.name == "step_00000007"
    assert loaded.rank_state is not None
    assert loaded.rank_state["rng"].tolist() == [1, 2]
    assert loaded.meta["lr"] == 0.30000000000000004
    assert loaded.meta["big"] == 2**62
    assert loaded.meta["nan"] != loaded.meta["nan"]
    assert repr(read_meta_file(path)[1]) == repr(meta)


def test_any_rectangle_loads_from_a_whole_tensor(tmp_path: Path) -> None:
    whole = torch.randn(8, 12).to(torch.float8_e4m3fn)
    path = _save(tmp_path, {"w": whole})
    part = torch.zeros(3, 5).to(torch.float8_e4m3fn)
    load_checkpoint(path, {"w": LogicalTensor(part, (8, 12), (4, 7))}, group=None)
    assert torch.equal(part.view(torch.uint8), whole.view(torch.uint8)[4:7, 7:12])


def test_mismatches_are_listed_and_nothing_is_touched(tmp_path: Path) -> None:
    path = _save(tmp_path, {"same": torch.ones(2), "shape": torch.ones(4), "gone": torch.ones(1)})
    tensors = {"same": torch.zeros(2), "shape": torch.zeros(5), "new": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, tensors, group=None)
    text = str(caught.value)
    assert "shape: checkpoint has (4,) float32, run has (5,) float32" in text
    assert "new: not in the checkpoint" in text
    assert "gone: only in the checkpoint" in text
    assert torch.equal(tensors["same"], torch.zeros(2))


def test_dtype_is_never_converted(tmp_path: Path) -> None:
    path = _save(tmp_path, {"x": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"x: checkpoint has \(2,\) float32, run has \(2,\) bfloat16"):
        load_checkpoint(path, {"x": torch.zeros(2, dtype=torch.bfloat16)}, group=None)


def test_many_mismatches_stay_within_five_lines(tmp_path: Path) -> None:
    path = _save(tmp_path, {f"layer.{i}": torch.ones(1) for i in range(100)})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, {}, group=None)
    assert len(str(caught.value).splitlines()) <= 5
    assert "97 more" in str(caught.value)


def test_part_of_a_checkpoint_loads_when_asked(tmp_path: Path) -> None:
    path = _save(tmp_path, {"model.w": torch.ones(2), "optimizer.m": torch.ones(2)})
    weight = torch.zeros(2)
    load_checkpoint(path, {"model.w": weight}, group=None, allow_unexpected=True)
    assert weight.tolist() == [1, 1]


def test_rectangles_that_do_not_tile_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="declare 2 elements of a tensor with 4"):
        _save(tmp_path, {"w": LogicalTensor(torch.ones(2), (4,), (0,))})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="leaves the tensor"):
        LogicalTensor(torch.ones(3), (4,), (2,))


def _draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


@pytest.mark.parametrize("odd_draws", [0, 1])
def test_generators_continue_where_they_were(tmp_path: Path, odd_draws: int) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    for _ in range(odd_draws):  # leaves a cached second normal in Python's and NumPy's generators
        random.gauss(0, 1), np.random.randn()
    state = capture_rng(torch.device("cpu"))
    path = save_checkpoint(tmp_path, 1, {}, meta={}, rank_state=state, group=None, keep_last=1)
    expected = [_draw() for _ in range(3)]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    rank_state = load_checkpoint(path, {}, group=None).rank_state
    assert rank_state is not None
    restore_rng(rank_state, torch.device("cpu"))
    assert [_draw() for _ in range(3)] == expected


def test_saving_and_loading_leave_the_generators_alone(tmp_path: Path) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    expected = _draw()
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    load_checkpoint(_save(tmp_path, {"x": torch.ones(4)}), {"x": torch.ones(4)}, group=None)
    assert _draw() == expected
